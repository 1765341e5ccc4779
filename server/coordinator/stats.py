"""What the coordinator counts, and the `Stats` snapshot it answers with. Cheap enough for every tick."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from server.messages import Histogram

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096)
SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))


class Accumulator:
    """A cumulative histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[int(np.searchsorted(self._bounds, value))] += 1
        self._sum += value

    def add_all(self, values: npt.NDArray[np.floating]) -> None:
        buckets = np.searchsorted(self._bounds, values)
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self._sum += float(values.sum())

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds.tolist(), self._counts.tolist(), self._sum)


class ExpertCounters:
    """One expert's counters."""

    def __init__(self) -> None:
        self.share = Accumulator(SHARES)
        self.decisive = 0
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
        self.phase_seconds: dict[str, float] = dict.fromkeys(("engine", "align", "fuse", "sample", "step", "emit"), 0.0)
        self.experts = [ExpertCounters() for _ in range(experts)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name` of the tick."""
        started = time.perf_counter()
        yield
        self.phase_seconds[name] += time.perf_counter() - started

    def count_coefficients(self, coefficients: npt.NDArray[np.float32]) -> None:
        """Count the coefficients [B, E] of B tokens as shares |c_i| / sum_j |c_j|; the largest share was decisive."""
        size = np.abs(coefficients)
        shares = size / np.maximum(size.sum(axis=1, keepdims=True), 1e-12)
        decisive = np.bincount(shares.argmax(axis=1), minlength=shares.shape[1])
        for index, expert in enumerate(self.experts):
            expert.share.add_all(shares[:, index])
            expert.decisive += int(decisive[index])
