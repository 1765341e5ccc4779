"""What the coordinator counts. Cheap enough for every tick; `server.coordinator.snapshot` makes `Stats` of it."""

from __future__ import annotations

import time
from collections import Counter

from server.coordinator.tally import TokenTally
from server.metrics.histogram import Buckets

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096)
QUEUE_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PHASES = ("engine", "exchange", "align", "fuse", "look_up", "gate", "sample", "send")


class TickClock:
    """Where the time goes. A tick lasts from one start of the engines' steps to the next, and each moment of it belongs
    to one phase:

    `engine`: the slowest engine's step, up to its report; `exchange`: the rest of the wait for the reports (messages,
    the end of the engines' last step, and the coordinator's own work meanwhile); `align`; `fuse`, but for what is in
    `look_up` (exact log-probabilities from the experts) and `gate`; `sample`; `send` (append, admit, tell the engines).
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.ticks = Buckets(SECONDS)
        self._started = self._lapped = time.perf_counter()
        self._ticking = False

    def start(self, slowest: float | None) -> None:
        """All reports are there; the slowest engine took `slowest` seconds for its step. None: no engine had one to do,
        so that this is no tick."""
        self._ticking = slowest is not None
        waited = self.lap("exchange")
        if slowest is None:
            return
        engine = min(slowest, waited)
        self.seconds["engine"] += engine
        self.seconds["exchange"] -= engine

    def lap(self, phase: str) -> float:
        """The time since the last lap, now that phase's."""
        now = time.perf_counter()
        passed, self._lapped = now - self._lapped, now
        if self._ticking:
            self.seconds[phase] += passed
        return passed

    def stop(self) -> None:
        """The engines start their next step."""
        self.lap("send")
        if self._ticking:
            self.ticks.observe(self._lapped - self._started)
        self._started = self._lapped


class ExpertCounters:
    """One expert's counters."""

    def __init__(self) -> None:
        self.step_seconds = Buckets(SECONDS)
        self.barrier_wait_seconds = 0.0
        self.slowest_ticks = 0
        self.masked_rows = 0
        self.prefilled_tokens = 0
        self.cached_tokens = 0


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
        self.queue_seconds = Buckets(QUEUE_SECONDS)
        self.clock = TickClock()
        self.tally = TokenTally(experts)
        self.experts = [ExpertCounters() for _ in range(experts)]
