"""The one histogram that is counted into, by the coordinator in every tick and by the api. Pure Python: who counts need
not have prometheus_client.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from server.wire.stats import Histogram


class Buckets:
    """A cumulative histogram; an observation costs one bisection. `bounds`: upper bounds of the buckets, ascending;
    there is one more bucket past the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, as often as it occurred."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def snapshot(self) -> Histogram:
        """As it is now."""
        return Histogram(self._bounds, list(self._counts), self._sum)
