"""When an expert whose process ended is started again: at once, then later each time, and at some point no more."""

from __future__ import annotations

from collections import deque

_HOUR_SECONDS = 3600.0
_MAX_PAUSE_SECONDS = 30.0


class Restarts:
    """One expert's restarts of the last hour; at most `per_hour` are granted."""

    def __init__(self, per_hour: int) -> None:
        self._per_hour = per_hour
        self._granted: deque[float] = deque()

    def pause(self, now: float) -> float | None:
        """Grant one more at `now` (seconds, monotonic): how long to wait with it. None: there have been too many."""
        while self._granted and now - self._granted[0] > _HOUR_SECONDS:
            self._granted.popleft()
        if len(self._granted) >= self._per_hour:
            return None
        pause = min(2.0 ** len(self._granted) - 1, _MAX_PAUSE_SECONDS)
        self._granted.append(now)
        return pause
