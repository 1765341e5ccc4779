"""What the coordinator counts, cumulative since start; `server.coordinator.snapshot` makes `Stats` of it."""

from __future__ import annotations

from collections import Counter

from server.coordinator.clock import SECONDS
from server.metrics.histogram import Buckets

NATS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
BYTES = ("lists", "rows")
"""What experts show: lists of each row, and some rows whole."""
REASONS = ("token", "logprobs")
"""Why a row had to be known whole: for its token, or for log-probabilities that were asked for."""
QUEUE_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ExpertCounters:
    """One expert's counters."""

    def __init__(self) -> None:
        self.step_seconds = Buckets(SECONDS)
        """What its steps took, by its own clock."""
        self.barrier_wait_seconds = 0.0
        """How long it waited for the last expert's report."""
        self.slowest_ticks = 0
        """Ticks in which the others waited for it."""
        self.masked_rows = 0
        """Rows that it gave and that were not usable."""
        self.prefilled_tokens = 0
        """Tokens that sequences were placed in it with."""
        self.cached_tokens = 0
        """Of these, found in its prefix cache."""
        self.received_bytes = dict.fromkeys(BYTES, 0)
        """What it has shown of its distributions."""


class Counters:
    """All counters of a coordinator over `experts` experts."""

    def __init__(self, experts: int) -> None:
        self.ticks = 0
        """Ticks for which at least one engine had reported."""
        self.tokens = 0
        """Tokens generated."""
        self.parked = 0
        """Times that a sequence left one engine because another had not reported it."""
        self.readded = 0
        """Times that a sequence was placed in an engine with tokens that it had generated."""
        self.position_faults = 0
        """Rows reported at an unexpected position."""
        self.gate_failures = 0
        """Rows for which the gate gave no usable answer."""
        self.finished: Counter[str] = Counter()
        """Sequences, by how they ended."""
        self.queue_seconds = Buckets(QUEUE_SECONDS)
        """From submission to admission."""
        self.bound = Buckets(NATS)
        """How far the log of the fused distribution's normaliser may be from what is known, for each token."""
        self.whole_rows = dict.fromkeys(REASONS, 0)
        """Tokens for which rows had to be known whole."""
        self.experts = [ExpertCounters() for _ in range(experts)]
        """Each expert's own."""
