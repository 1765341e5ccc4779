"""What one key may ask for: requests at once, and requests a minute. Stands behind `KeyRequired`, before the routes."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http.errors import error_response
from server.errors import RateLimited

_GENERATING = ("/v1/chat/completions", "/v1/completions")


@dataclass(slots=True)
class _Use:
    """What one key uses."""

    spare: float
    """Requests that it may still start, as of `since`."""
    since: float
    """Seconds, on the limiter's clock."""
    running: int = 0
    """Requests that it runs."""


class KeyLimited:
    """Refuses generating requests with 429 where their key already runs `max_running` of them, or has started
    `per_minute` (a bucket of so many requests that refills evenly). None: no limit."""

    def __init__(
        self, app: ASGIApp, max_running: int | None, per_minute: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._max_running = max_running
        self._per_minute = per_minute
        self._clock = clock
        self._uses: defaultdict[bytes, _Use] = defaultdict(lambda: _Use(float(per_minute or 0), clock()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in _GENERATING:
            await self._app(scope, receive, send)
            return
        use = self._uses[scope["state"]["key"]]
        if fault := self._refusal(use):
            await error_response(fault)(scope, receive, send)
            return
        use.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            use.running -= 1

    def _refusal(self, use: _Use) -> RateLimited | None:
        """Why `use` may not grow by a request; None if it may, and then the bucket is one lower."""
        if self._max_running is not None and use.running >= self._max_running:
            return RateLimited(f"this key may run at most {self._max_running} requests at once", retry_after=1)
        if self._per_minute is None:
            return None
        now = self._clock()
        use.spare = min(self._per_minute, use.spare + (now - use.since) * self._per_minute / 60)
        use.since = now
        if use.spare < 1:
            wait = math.ceil((1 - use.spare) * 60 / self._per_minute)
            return RateLimited(f"this key may start at most {self._per_minute} requests a minute", retry_after=wait)
        use.spare -= 1
        return None
