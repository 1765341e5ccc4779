"""What every request passes through, as plain ASGI: an id, a log line and a count; a key; a limit on the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.errors import ClientGone, UnsupportedMedia, error_response, internal_error
from server.api.summary import RequestSummary
from server.api.tracing import RequestTrace, Tracing
from server.errors import BodyTooLarge, GenerationFailed, Unauthorized
from server.logs import REQUEST_ID, fields
from server.metrics.api import ApiMetrics

_REQUEST_ID = re.compile(rb"^[A-Za-z0-9._-]{1,128}$")
_log = logging.getLogger("polylogit.api")

_PROBES = ("/health", "/health/live", "/health/ready", "/metrics")
"""Asked every few seconds by machines: their lines are for `debug`."""


class Observed:
    """Gives the request its id, echoes it, logs one line, counts, and turns a bug into a 500 error object."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, send)
        REQUEST_ID.set(exchange.request_id)
        trace = exchange.trace = scope["state"]["trace"] = self._tracing.start(scope) if self._tracing else None
        self._metrics.in_flight += 1
        try:
            await self._serve(exchange, receive)
        finally:
            self._metrics.in_flight -= 1
            self._metrics.request(exchange.route, exchange.outcome, exchange.seconds)
            if trace:
                trace.end(exchange.request_id, exchange.status, exchange.route, exchange.summary, gone=exchange.gone)
            level = logging.DEBUG if exchange.route in _PROBES else logging.INFO
            _log.log(level, "request", extra=exchange.figures())

    async def _serve(self, exchange: _Exchange, receive: Receive) -> None:
        try:
            await self._app(exchange.scope, receive, exchange.send)
        except (ClientGone, ClientDisconnect):
            exchange.gone = True
        except asyncio.CancelledError:  # by the HTTP server, whose time to stop is over; never because a client left
            exchange.summary.note_error(GenerationFailed("the server ended before the answer did"))
            raise
        except Exception:
            fault = internal_error()
            exchange.summary.note_error(fault)
            if exchange.status:
                raise
            await error_response(fault)(exchange.scope, receive, exchange.send)


class _Exchange:
    """One request and its response on their way through."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope = scope
        self.status = 0
        self.gone = False
        self._send = send
        self._since = time.perf_counter()
        given = _header(scope, b"x-request-id")
        self.request_id = given.decode() if _REQUEST_ID.match(given) else uuid.uuid4().hex
        self.summary = RequestSummary()
        self.trace: RequestTrace | None = None
        scope.setdefault("state", {}).update(request_id=self.request_id, summary=self.summary)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since

    @property
    def route(self) -> str:
        """The route's template: made-up paths and model names must not make new series."""
        return str(getattr(self.scope.get("route"), "path", "other"))

    @property
    def outcome(self) -> str:
        if self.gone:
            return "disconnected"
        if self.summary.failed:  # perhaps after the status was sent
            return "server_error"
        if not self.status:
            return "disconnected"
        return {2: "ok", 3: "ok", 4: "client_error"}.get(self.status // 100, "server_error")

    def figures(self) -> dict[str, Any]:
        """The fields of its log line."""
        summary, usage = self.summary, self.summary.usage
        return fields(
            method=self.scope["method"],
            route=self.route,
            status=self.status or None,
            outcome=self.outcome,
            seconds=round(self.seconds, 4),
            model=summary.model,
            prompt_tokens=usage and usage.prompt_tokens,
            completion_tokens=usage and usage.completion_tokens,
            finish_reasons=summary.finish_reasons or None,
            error=summary.error,
            trace_id=self.trace and self.trace.trace_id,
        )


class KeyRequired:
    """Bearer keys, compared as digests in constant time. The digest goes on as `state.key`.

    `is_open` says of a path and a method whether they need no key.
    """

    def __init__(self, app: ASGIApp, digests: Collection[bytes], is_open: Callable[[str, str], bool]) -> None:
        self._app = app
        self._digests = digests
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _digest(_header(scope, b"authorization"))
        if self._is_open(scope["path"], scope["method"]) or self._is_valid(key):
            scope["state"]["key"] = key
            await self._app(scope, receive, send)
            return
        fault = Unauthorized("a valid API key is required, as 'Authorization: Bearer KEY'", code="invalid_api_key")
        await error_response(fault)(scope, receive, send)

    def _is_valid(self, digest: bytes) -> bool:
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0  # all are compared


def _digest(header: bytes) -> bytes:
    """Of the key in an authorization header; of none, where there is none, it is empty."""
    scheme, _, key = header.partition(b" ")
    return hashlib.sha256(key.strip()).digest() if scheme.lower() == b"bearer" else b""


def key_digests(keys: Iterable[str]) -> frozenset[bytes]:
    return frozenset(hashlib.sha256(key.strip().encode()).digest() for key in keys if key.strip())


class BodyLimited:
    """Refuses a body that is too long, by its declared length or as it arrives, and one that is compressed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _header(scope, b"content-encoding").lower() not in (b"", b"identity"):
            await error_response(UnsupportedMedia("compressed bodies are not accepted"))(scope, receive, send)
            return
        length = _header(scope, b"content-length")
        if length.isdigit() and (len(length) > 15 or int(length) > self._max_bytes):
            await error_response(self._fault())(scope, receive, send)
            return
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._max_bytes:
                raise self._fault()
            return message

        await self._app(scope, counted, send)

    def _fault(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is longer than {self._max_bytes} bytes")


def _header(scope: Scope, name: bytes) -> bytes:
    """The first header called `name`, or empty."""
    headers: list[Any] = scope["headers"]
    return next((value for key, value in headers if key == name), b"")
