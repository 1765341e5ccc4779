"""uvicorn, made strict: limits on request headers, a connection that can be cut, and no signal handlers of
its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.faults import error_object
from server.errors import BadRequest

_MOST_HEADERS = 100
_MOST_HEADER_BYTES = 64 * 1024
_HEADER_SECONDS = 20.0
_KEEP_ALIVE_SECONDS = 75
_STOP_SECONDS = 5


class Connection(HttpToolsProtocol):
    """One client connection. A request's headers must be few, short and complete within a time limit."""

    _header_bytes = 0
    _in_headers = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > _MOST_HEADER_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"polylogit.abort": {"call": self.transport.abort}}
        if not self._in_headers:
            self._begin_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > _MOST_HEADERS:
            self._refuse()

    def on_headers_complete(self) -> None:
        self._end_headers()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """An error object, as everywhere."""
        body = error_object(BadRequest(msg))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def _begin_headers(self) -> None:
        self._in_headers = True
        self._header_bytes = 0
        self._deadline = self.loop.call_later(_HEADER_SECONDS, self.transport.abort)

    def _end_headers(self) -> None:
        self._in_headers = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self._end_headers()
            self.send_400_response("the request headers are too long")


class HttpServer(uvicorn.Server):
    """Runs until `should_exit` is set; signals are the supervisor's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: ASGIApp, **settings: Any) -> HttpServer:
    """A server for `app`; `settings` overrides uvicorn's."""
    defaults: dict[str, Any] = {
        "http": Connection,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": _KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": _STOP_SECONDS,
    }
    return HttpServer(uvicorn.Config(app, **(defaults | settings)))
