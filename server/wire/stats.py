"""The coordinator's counters, as the api asks for them: what /metrics, `polylogit bench` and tests read."""

from __future__ import annotations

from server.wire.base import Message


class Histogram(Message, frozen=True, tag="Histogram"):
    """Cumulative histogram since start: `counts[i]` observations in (bounds[i-1], bounds[i]], one more past the
    last."""

    bounds: list[float]
    counts: list[int]
    sum: float


class ExpertStats(Message, frozen=True, tag="ExpertStats"):
    """One expert's part of `Stats`. Seconds and tokens; counters are cumulative since start.

    `weight`: its share of the coefficients of each fused token. `decisive_tokens`: fused tokens for which that share
    was larger than any other's. `slowest_ticks`: ticks in which the others waited for it. `prefilled_tokens`: given to
    the engine with the sequences it started, those started again included; `cached_tokens`: of these, found in its
    prefix cache. `kv_tokens`: what its KV cache holds. `engine`: the engine's version.
    """

    name: str
    up: bool
    engine: str
    restarts: int
    weight: Histogram
    decisive_tokens: int
    step_seconds: Histogram
    barrier_wait_seconds: float
    slowest_ticks: int
    kv_used: float
    kv_tokens: int
    running: int
    preemptions: int
    masked_rows: int
    prefilled_tokens: int
    cached_tokens: int


class FusionStats(Message, frozen=True, tag="FusionStats"):
    """Counts over fused tokens: those for which at least two experts had a usable row. Cumulative since start.

    `disagreements`: the experts' most probable tokens were not all the same. `certificates`: how many tokens had each
    `server.coordinator.certificate` verdict. `entropy`: of the coefficients' shares, in nats.
    """

    tokens: int
    disagreements: int
    certificates: dict[str, int]
    entropy: Histogram


class Stats(Message, frozen=True, tag="Stats"):
    """A snapshot of the coordinator, for /metrics, `polylogit bench` and tests. `queue_seconds`: from submission to
    admission. `phase_seconds`: phase of the tick -> seconds; the phases make up `tick_seconds`."""

    ticks: int
    tokens: int
    running: int
    queued: int
    parked: int
    readded: int
    position_faults: int
    gate_failures: int
    finished: dict[str, int]
    queue_seconds: Histogram
    tick_seconds: Histogram
    phase_seconds: dict[str, float]
    fusion: FusionStats
    experts: list[ExpertStats]
