"""uvicorn, made strict: limits on headers and trailers, on the time that a client may take to send and to read, and no
signal handlers of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.api.http.errors import error_object
from server.errors import BadRequest

_MAX_HEADERS = 100
_MAX_BARE_BYTES = 64 * 1024
_HEADER_SECONDS = 20.0
_BODY_SECONDS = 75.0  # `server.api.http.body` waits less, and answers
_KEEP_ALIVE_SECONDS = 75
_STOP_SECONDS = 5


class StrictConnection(HttpToolsProtocol):
    """One client connection. What a request has around its body, even trailers after it, must be short, and all of it
    arrive within a time limit: the parser itself keeps what is unfinished."""

    _bare_bytes = 0  # since the last piece of a body
    _in_headers = True  # or before them
    _unfinished = True
    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        write_seconds: float,
    ) -> None:
        """`write_seconds`: how long more than a little may wait to be read; the others are uvicorn's."""
        super().__init__(config, server_state, app_state, _loop)
        self._write_seconds = write_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit(_HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unlimit()
        self._unlimit_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bare_bytes += len(data)
        self._unfinished = True
        super().data_received(data)
        if self._bare_bytes > _MAX_BARE_BYTES:
            self._refuse()
        elif not self._unfinished:
            self._unlimit()
        elif self._deadline is None:
            self._limit(_HEADER_SECONDS if self._in_headers else _BODY_SECONDS)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unfinished = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_headers:  # a trailer
            return
        super().on_header(name, value)
        if len(self.headers) > _MAX_HEADERS:
            self._refuse()

    def on_headers_complete(self) -> None:
        self._bare_bytes = 0
        self._unlimit()
        if not self.transport.is_closing():
            super().on_headers_complete()
            self._in_headers = False

    def on_body(self, body: bytes) -> None:
        self._bare_bytes = 0
        if not self._in_headers:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._bare_bytes = 0
        self._unfinished = False
        if not self._in_headers:
            super().on_message_complete()
            self._in_headers = True

    def send_400_response(self, msg: str) -> None:
        """An error object, as everywhere; nothing in the middle of another answer."""
        if self._answered:
            self.transport.abort()
        elif not self.transport.is_closing():
            body = error_object(BadRequest(msg))
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self._write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._unlimit_writing()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """An answer that was not read until now is not waited for."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    @property
    def _answering(self) -> bool:
        """Whether an answer is still to come, or to end."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _answered(self) -> bool:
        """Whether the message that is being read has its answer, or has to wait for another's."""
        return self._answering if self._in_headers else self.cycle.response_started or bool(self.pipeline)

    def _limit(self, seconds: float) -> None:
        self._deadline = self.loop.call_later(seconds, self._expire, seconds)

    def _unlimit(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _unlimit_writing(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _expire(self, seconds: float) -> None:
        """While there is an answer to wait for, the rest of the request, or the next one, may take longer."""
        if self._answering:
            self._limit(seconds)
        else:
            self.transport.abort()

    def _refuse(self) -> None:
        self._unlimit()
        self.send_400_response("the request headers are too long")


class HttpServer(uvicorn.Server):
    """Runs until `should_exit` is set; signals are the supervisor's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: ASGIApp, write_seconds: float) -> HttpServer:
    """A server for `app`."""
    connection: Any = functools.partial(StrictConnection, write_seconds=write_seconds)
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    return HttpServer(config)
