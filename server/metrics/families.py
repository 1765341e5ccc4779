"""A coordinator's `Stats` as Prometheus metric families. Labels have few values: experts, phases, reasons, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from server.request import FinishReason
from server.wire.stats import ExpertStats, FusionStats, Histogram, Stats

OfExpert = Callable[[ExpertStats], float]
_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]


def stats_families(stats: Stats) -> Iterator[Metric]:
    """All that the coordinator knows."""
    yield from _sequences(stats)
    yield from _ticks(stats)
    yield from _fusion(stats.fusion)
    yield from _exactness(stats)
    yield from _experts(stats.experts)


def _sequences(stats: Stats) -> Iterator[Metric]:
    yield gauge("running_sequences", "Sequences now generated.", stats.running)
    yield gauge("queued_sequences", "Sequences waiting for admission.", stats.queued)
    ended = {reason.value: stats.finished.get(reason, 0) for reason in FinishReason}
    yield counters("finished_sequences", "Sequences that have ended, by reason.", "reason", ended)
    yield counter("parked_sequences", "Times a sequence left an engine to be aligned with the others.", stats.parked)
    yield counter("readded_sequences", "Times a sequence was given to an engine again, with its tokens.", stats.readded)
    yield histogram("queue_seconds", "Time from submission to admission.", stats.queue_seconds)


def _ticks(stats: Stats) -> Iterator[Metric]:
    yield counter("ticks", "Lockstep ticks: one step of every engine that had one to do.", stats.ticks)
    yield counter("tokens", "Tokens generated, and tokens of prompts scored one a tick.", stats.tokens)
    yield histogram("tick_seconds", "From one start of the engines' steps to the next.", stats.tick_seconds)
    yield counters("tick_phase_seconds", "The ticks' time, by phase.", "phase", stats.phase_seconds)
    yield counter("position_faults", "Rows that engines reported for another position than due.", stats.position_faults)
    yield counter("gate_failures", "Tokens for which the gate gave no usable coefficients.", stats.gate_failures)


def _fusion(fusion: FusionStats) -> Iterator[Metric]:
    yield counter("fused_tokens", "Tokens that at least two experts had a usable row for.", fusion.tokens)
    text = "Fused tokens for which the experts' most probable tokens differed."
    yield counter("disagreement_tokens", text, fusion.disagreements)
    text = "Fused tokens, by what the lists alone say of the most probable one (unbounded: negative coefficients)."
    yield counters("certificates", text, "verdict", fusion.certificates)
    yield histogram("coefficient_entropy_nats", "Entropy of the coefficients' shares of a fused token.", fusion.entropy)


def _exactness(stats: Stats) -> Iterator[Metric]:
    text = "How far the log of a token's normaliser may be from what is known of it; 0 where rows were known whole."
    yield histogram("normaliser_bound_nats", text, stats.bound)
    text = "Tokens that needed the experts' whole rows: for the token itself, or for its log-probabilities."
    yield counters("whole_rows", text, "reason", stats.whole_rows)


def _experts(experts: Sequence[ExpertStats]) -> Iterator[Metric]:
    engines = GaugeMetricFamily("polylogit_expert_info", "The engine's version.", labels=["expert", "engine"])
    for expert in experts:
        engines.add_metric([expert.name, expert.engine], 1)
    yield engines
    for name, (text, value) in _GAUGES.items():
        yield _by_expert(GaugeMetricFamily, name, text, value, experts)
    for name, (text, value) in _COUNTERS.items():
        yield _by_expert(CounterMetricFamily, name, text, value, experts)
    yield _received_bytes(experts)
    weights = {expert.name: expert.weight for expert in experts}
    yield histograms("expert_weight", "Its share of the coefficients of a fused token.", "expert", weights)
    steps = {expert.name: expert.step_seconds for expert in experts}
    yield histograms("expert_step_seconds", "An engine's step, up to its report.", "expert", steps)


_GAUGES: Mapping[str, tuple[str, OfExpert]] = {
    "up": ("1 while the engine answers.", lambda expert: expert.up),
    "kv_used_ratio": ("Part of the KV cache in use.", lambda expert: expert.kv_used),
    "kv_capacity_tokens": ("Tokens that the KV cache holds.", lambda expert: expert.kv_tokens),
    "running_sequences": ("Sequences in the engine.", lambda expert: expert.running),
}
_COUNTERS: Mapping[str, tuple[str, OfExpert]] = {
    "restarts": ("Restarts of the worker.", lambda expert: expert.restarts),
    "decisive_tokens": ("Fused tokens for which its share was larger than any other's.", lambda e: e.decisive_tokens),
    "barrier_wait_seconds": ("Time it waited for slower experts.", lambda expert: expert.barrier_wait_seconds),
    "slowest_ticks": ("Ticks in which the others waited for it.", lambda expert: expert.slowest_ticks),
    "preemptions": ("Preemptions in the engine.", lambda expert: expert.preemptions),
    "masked_rows": ("Rows without a usable distribution.", lambda expert: expert.masked_rows),
    "prefilled_tokens": (
        "Tokens given to it with sequences, those added again included.",
        lambda e: e.prefilled_tokens,
    ),
    "cached_tokens": ("Of the prefilled tokens, those found in its prefix cache.", lambda e: e.cached_tokens),
}


def _by_expert(family: _Family, name: str, text: str, value: OfExpert, experts: Sequence[ExpertStats]) -> Metric:
    metric = family(f"polylogit_expert_{name}", text, labels=["expert"])
    for expert in experts:
        metric.add_metric([expert.name], value(expert))
    return metric


def _received_bytes(experts: Sequence[ExpertStats]) -> Metric:
    text = "What it has shown of its distributions: lists of each row, and some rows whole."
    family = CounterMetricFamily("polylogit_expert_received_bytes", text, labels=["expert", "kind"])
    for expert in experts:
        for kind, count in expert.received_bytes.items():
            family.add_metric([expert.name, kind], count)
    return family


# --- families in one line -----------------------------------------------------------------------------------------


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"polylogit_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"polylogit_{name}", text, value=value)


def counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"polylogit_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def histogram(name: str, text: str, value: Histogram) -> Metric:
    family = HistogramMetricFamily(f"polylogit_{name}", text, labels=[])
    _add(family, [], value)
    return family


def histograms(name: str, text: str, label: str, values: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(f"polylogit_{name}", text, labels=[label])
    for key, value in values.items():
        _add(family, [key], value)
    return family


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    """Prometheus counts cumulatively: each bucket includes those below it."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
    family.add_metric(labels, buckets, histogram.sum)
