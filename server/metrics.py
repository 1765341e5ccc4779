"""Prometheus text from a coordinator's `Stats` and from what the api process measures itself.

Nothing here is registered globally, and every label has a bounded set of values: expert names, route
templates, outcomes, finish reasons, phases.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.messages import ExpertStats, Histogram, Stats

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Buckets:
    """A histogram that costs one bisection for each observation."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, self._counts, self._sum)


class Timing:
    """The clock of one request: time to the first token, then between tokens."""

    def __init__(self, metrics: ApiMetrics) -> None:
        self._metrics = metrics
        self._since = time.perf_counter()
        self._started = False

    def first(self) -> None:
        """Something arrived; only the first call counts."""
        if not self._started:
            self._started = True
            self._metrics.first_token.observe(time.perf_counter() - self._since)

    def next(self, tokens: int) -> None:
        """`tokens` arrived together in a stream: the pause before them is shared out."""
        if not tokens:
            return
        now = time.perf_counter()
        if self._started:
            self._metrics.inter_token.observe((now - self._since) / tokens, tokens)
        else:
            self.first()
        self._since = now


class ApiMetrics:
    """What the api process counts about its own requests."""

    def __init__(self) -> None:
        self.first_token = Buckets(_LONG)
        self.inter_token = Buckets(_SHORT)
        self._requests: dict[tuple[str, str], int] = {}
        self._durations: dict[str, Buckets] = {}
        self.in_flight = 0

    def timing(self) -> Timing:
        return Timing(self)

    def request(self, route: str, outcome: str, seconds: float) -> None:
        """One request has ended."""
        self._requests[route, outcome] = self._requests.get((route, outcome), 0) + 1
        if route not in self._durations:
            self._durations[route] = Buckets(_LONG)
        self._durations[route].observe(seconds)

    def families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("polylogit_http_requests", "Finished requests.", labels=["route", "outcome"])
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        yield GaugeMetricFamily("polylogit_http_requests_in_flight", "Requests now served.", value=self.in_flight)
        duration = _histogram("polylogit_http_request_seconds", "From headers to the last byte.", "route")
        for route, buckets in self._durations.items():
            _add(duration, [route], buckets.snapshot())
        yield duration
        first = _histogram("polylogit_time_to_first_token_seconds", "From submission to the first token.")
        _add(first, [], self.first_token.snapshot())
        yield first
        inter = _histogram("polylogit_inter_token_seconds", "Between tokens of a stream.")
        _add(inter, [], self.inter_token.snapshot())
        yield inter


def render(api: ApiMetrics, stats: Stats | None, *, ready: bool) -> bytes:
    """The text of /metrics. `stats` None: the coordinator has not answered yet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(api, stats, ready=ready))
    return generate_latest(registry)


class _Snapshot(Collector):
    """One scrape."""

    def __init__(self, api: ApiMetrics, stats: Stats | None, *, ready: bool) -> None:
        self._api = api
        self._stats = stats
        self._ready = ready

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("polylogit_ready", "1 while new requests are accepted.", value=int(self._ready))
        yield from self._api.families()
        if self._stats is not None:
            yield from coordinator_families(self._stats)
            yield from expert_families(self._stats.experts)


def coordinator_families(stats: Stats) -> Iterator[Metric]:
    counters = {
        "ticks": ("Lockstep ticks.", stats.ticks),
        "tokens": ("Tokens generated.", stats.tokens),
        "parked_sequences": ("Times a sequence was parked to be aligned again.", stats.parked),
        "readded_sequences": ("Times a parked sequence was added again.", stats.readded),
        "position_faults": ("Positions on which engines disagreed.", stats.position_faults),
        "gate_failures": ("Tokens for which the gate failed.", stats.gate_failures),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"polylogit_{name}", text, value=value)
    yield GaugeMetricFamily("polylogit_running_sequences", "Sequences now generated.", value=stats.running)
    yield GaugeMetricFamily("polylogit_queued_sequences", "Sequences waiting for admission.", value=stats.queued)
    finished = CounterMetricFamily("polylogit_finished_sequences", "Ended sequences.", labels=["reason"])
    for reason, count in stats.finished.items():
        finished.add_metric([reason], count)
    yield finished
    ticks = _histogram("polylogit_tick_seconds", "Duration of a tick.")
    _add(ticks, [], stats.tick_seconds)
    yield ticks
    phases = CounterMetricFamily("polylogit_phase_seconds", "Time in each phase of the ticks.", labels=["phase"])
    for phase, seconds in stats.phase_seconds.items():
        phases.add_metric([phase], seconds)
    yield phases


def expert_families(experts: Sequence[ExpertStats]) -> Iterator[Metric]:
    gauges: dict[str, tuple[str, Callable[[ExpertStats], float]]] = {
        "up": ("1 while the engine answers.", lambda expert: expert.up),
        "kv_used_ratio": ("Part of the KV cache in use.", lambda expert: expert.kv_used),
        "running_sequences": ("Sequences in the engine.", lambda expert: expert.running),
    }
    counters: dict[str, tuple[str, Callable[[ExpertStats], float]]] = {
        "restarts": ("Restarts of the worker.", lambda expert: expert.restarts),
        "decisive_tokens": ("Tokens for which its share was the largest.", lambda e: e.decisive_tokens),
        "barrier_wait_seconds": ("Time it waited for slower experts.", lambda e: e.barrier_wait_seconds),
        "preemptions": ("Preemptions in the engine.", lambda expert: expert.preemptions),
        "masked_rows": ("Rows without a usable distribution.", lambda expert: expert.masked_rows),
    }
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(f"polylogit_expert_{name}", text, labels=["expert"])
        for expert in experts:
            gauge.add_metric([expert.name], value(expert))
        yield gauge
    for name, (text, value) in counters.items():
        counter = CounterMetricFamily(f"polylogit_expert_{name}", text, labels=["expert"])
        for expert in experts:
            counter.add_metric([expert.name], value(expert))
        yield counter
    weight = _histogram("polylogit_expert_weight", "Its share of the coefficients, for each token.", "expert")
    steps = _histogram("polylogit_expert_step_seconds", "Duration of an engine step.", "expert")
    for expert in experts:
        _add(weight, [expert.name], expert.weight)
        _add(steps, [expert.name], expert.step_seconds)
    yield weight
    yield steps


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=labels)


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    """Prometheus counts cumulatively: each bucket includes those below it."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
    family.add_metric(labels, buckets, histogram.sum)
