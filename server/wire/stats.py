"""The coordinator's counters, as the api asks for them: what /metrics, `polylogit bench` and tests read."""

from __future__ import annotations

from server.wire.base import Message


class Histogram(Message, frozen=True, tag="Histogram"):
    """Observations since start, by size."""

    bounds: list[float]
    """Upper bounds of N buckets, ascending."""
    counts: list[int]
    """N + 1 numbers: observations in (bounds[i-1], bounds[i]], the last beyond all bounds."""
    sum: float
    """Of all observations."""


class ExpertStats(Message, frozen=True, tag="ExpertStats"):
    """One expert's part of `Stats`. Counters are cumulative since start."""

    name: str
    """As configured."""
    up: bool
    """It answers."""
    engine: str
    """The engine's version."""
    restarts: int
    """Of its worker."""
    weight: Histogram
    """Its share of the coefficients of each fused token, in [0, 1]."""
    decisive_tokens: int
    """Fused tokens for which that share was larger than any other's."""
    step_seconds: Histogram
    """From the start of an engine's step to its report."""
    barrier_wait_seconds: float
    """How long it waited for slower experts."""
    slowest_ticks: int
    """Ticks in which the others waited for it."""
    kv_used: float
    """Part of its KV cache in use, in [0, 1]."""
    kv_tokens: int
    """Tokens that its KV cache holds."""
    running: int
    """Sequences in the engine."""
    preemptions: int
    """In the engine."""
    masked_rows: int
    """Rows without a usable distribution."""
    prefilled_tokens: int
    """Given to the engine with the sequences that it started, those started again included."""
    cached_tokens: int
    """Of these, found in its prefix cache."""
    received_bytes: dict[str, int]
    """What it has shown of its distributions: "lists" of each row, and some "rows" whole."""


class FusionStats(Message, frozen=True, tag="FusionStats"):
    """Counts over fused tokens: those for which at least two experts had a usable row. Cumulative since start."""

    tokens: int
    """How many there were."""
    disagreements: int
    """Those for which the experts' most probable tokens were not all the same."""
    certificates: dict[str, int]
    """Verdict of `server.coordinator.bounds` -> tokens that had it."""
    entropy: Histogram
    """Of the coefficients' shares of each token, in nats."""


class Stats(Message, frozen=True, tag="Stats"):
    """A snapshot of the coordinator, for /metrics, `polylogit bench` and tests. Counters are cumulative since start."""

    ticks: int
    """Steps of every engine that had one to do."""
    tokens: int
    """Tokens generated, and tokens of prompts that were scored one a tick."""
    running: int
    """Sequences that are generated now."""
    queued: int
    """Sequences that wait for admission now."""
    parked: int
    """Times that a sequence left an engine to be aligned with the others."""
    readded: int
    """Times that a sequence was given to an engine again, with its tokens."""
    position_faults: int
    """Rows that engines reported for another position than due."""
    gate_failures: int
    """Tokens for which the gate gave no usable coefficients."""
    finished: dict[str, int]
    """Reason -> sequences that ended for it."""
    queue_seconds: Histogram
    """From submission to admission."""
    tick_seconds: Histogram
    """From one start of the engines' steps to the next."""
    phase_seconds: dict[str, float]
    """Phase of the tick -> seconds; the phases make up `tick_seconds`."""
    bound: Histogram
    """How far the log of the fused distribution's normaliser may be from what is known of it, for each token, in nats;
    0 where rows were known whole."""
    whole_rows: dict[str, int]
    """Why -> tokens for which the experts were asked for whole rows: for the "token" itself, or for "logprobs"."""
    fusion: FusionStats
    """What came of fusing."""
    experts: list[ExpertStats]
    """E of them, in the deployment's order."""
