"""What the coordinator counts, and the `Stats` snapshot it answers with. Cheap enough for every tick."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import numpy as np

from server.coordinator.compiled import compiled
from server.coordinator.fusion import Float32, Float64, Int64
from server.messages import Histogram

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096)
SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))


class Accumulator:
    """A cumulative histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, list(self._counts), self._sum)


class ExpertCounters:
    """One expert's counters."""

    def __init__(self) -> None:
        self.step_seconds = Accumulator(SECONDS)
        self.barrier_wait_seconds = 0.0
        self.masked_rows = 0


class Counters:
    """All counters of a coordinator over `experts` experts."""

    def __init__(self, experts: int) -> None:
        self.ticks = 0
        self.tokens = 0
        self.parked = 0
        self.readded = 0
        self.position_faults = 0
        self.gate_failures = 0
        self.finished: Counter[str] = Counter()
        self.tick_seconds = Accumulator(SECONDS)
        self.phase_seconds: dict[str, float] = dict.fromkeys(
            ("engine", "align", "fuse", "gate", "sample", "step", "emit"), 0.0
        )
        self.experts = [ExpertCounters() for _ in range(experts)]
        self._share_counts = np.zeros((experts, len(SHARES) + 1), np.int64)
        self._share_sums = np.zeros(experts, np.float64)
        self._decisive = np.zeros(experts, np.int64)

    def lap(self, phase: str, started: float) -> float:
        """Add the time since `started` to a phase of the tick; now."""
        now = time.perf_counter()
        self.phase_seconds[phase] += now - started
        return now

    def count_coefficients(self, coefficients: Float32) -> None:
        """Count the coefficients [B, E] of B tokens as shares |c_i| / sum_j |c_j|; the largest share was decisive."""
        _count_shares(coefficients, self._share_counts, self._share_sums, self._decisive)

    def shares(self, expert: int) -> Histogram:
        return Histogram(list(SHARES), self._share_counts[expert].tolist(), float(self._share_sums[expert]))

    def decisive(self, expert: int) -> int:
        return int(self._decisive[expert])


@compiled
def _count_shares(coefficients: Float32, counts: Int64, sums: Float64, decisive: Int64) -> None:
    """Enter shares into histograms `counts` [E, bins] of width 1/20, `sums` [E] and `decisive` [E]."""
    for row in range(len(coefficients)):
        total = np.abs(coefficients[row]).sum()
        if total > 0:
            decisive[np.argmax(np.abs(coefficients[row]))] += 1
            for expert in range(coefficients.shape[1]):
                share = abs(coefficients[row, expert]) / total
                counts[expert, max(0, int(np.ceil(share * 20 - 1e-5)) - 1)] += 1
                sums[expert] += share
