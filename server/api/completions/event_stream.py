"""The bytes of server-sent events on their way to the client, with comments where there would be none for long."""

from __future__ import annotations

import asyncio

from starlette.types import Send

from server.api.client import Generation

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Sends the bytes of an event stream; wakes the reader when there were none for a while."""

    def __init__(self, send: Send, generation: Generation, keepalive: float) -> None:
        self.started = False
        self._send = send
        self._generation = generation
        self._keepalive = keepalive
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._sending = False
        self._period = min(1.0, keepalive / 2)
        self._timer = self._loop.call_later(self._period, self._check)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        self._since = self._loop.time()
        self._sending = True
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self._sending = False

    def close(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if not self._sending and self._loop.time() - self._since >= self._keepalive:
            self._generation.nudge()
        self._timer = self._loop.call_later(self._period, self._check)
