"""What the api process measures itself, and the text of /metrics: that, and the coordinator's `Stats`.

Nothing here is registered globally, and every label has a bounded set of values: expert names, route templates,
outcomes, finish reasons, phases.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server import __version__
from server.config import Config
from server.metrics.families import gauge, histogram, histograms, stats_families
from server.metrics.histogram import Buckets
from server.wire.stats import Stats

OUTCOMES = ("ok", "client_error", "server_error", "disconnected")

_COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class RequestTiming:
    """The clock of one request: time to the first token, then between tokens."""

    def __init__(self, metrics: ApiMetrics) -> None:
        self._metrics = metrics
        self._since = time.perf_counter()
        self._started = False

    def tokens(self, places: Sequence[int]) -> None:
        """Tokens have arrived together; `places` says which choice each belongs to. The pause before them is shared out
        among those of the choice that got most."""
        if not places:
            return
        now = time.perf_counter()
        if self._started:
            steps = max(map(places.count, set(places)))
            self._metrics.inter_token.observe((now - self._since) / steps, len(places))
        else:
            self._started = True
            self._metrics.first_token.observe(now - self._since)
        self._since = now


class ApiMetrics:
    """What the api process counts about its own requests. Series that will surely come are there from the start, so
    that their first event is an increase."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process = ProcessCollector(registry=None)
        self.first_token = Buckets(_LONG)
        self.inter_token = Buckets(_SHORT)
        self._requests = {(route, outcome): 0 for route in _COMPLETIONS for outcome in OUTCOMES}
        self._durations = {route: Buckets(_LONG) for route in _COMPLETIONS}
        self.in_flight = 0

    def timing(self) -> RequestTiming:
        return RequestTiming(self)

    def request(self, route: str, outcome: str, seconds: float) -> None:
        """One request has ended."""
        self._requests[route, outcome] = self._requests.get((route, outcome), 0) + 1
        if route not in self._durations:
            self._durations[route] = Buckets(_LONG)
        self._durations[route].observe(seconds)

    def families(self) -> Iterator[Metric]:
        yield self._build()
        limits = self._config.limits
        yield gauge("running_sequences_limit", "Sequences that may be generated at once.", limits.sequences)
        yield gauge("queued_sequences_limit", "Sequences that may wait beyond those.", limits.queue)
        requests = CounterMetricFamily("polylogit_http_requests", "Finished requests.", labels=["route", "outcome"])
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        yield requests
        yield gauge("http_requests_in_flight", "Requests now served, this one included.", self.in_flight)
        durations = {route: buckets.snapshot() for route, buckets in self._durations.items()}
        yield histograms("http_request_duration_seconds", "From headers to the last byte.", "route", durations)
        first, inter = self.first_token.snapshot(), self.inter_token.snapshot()
        yield histogram("time_to_first_token_seconds", "From submission to a request's first token.", first)
        yield histogram("inter_token_latency_seconds", "Between two tokens of a choice.", inter)
        yield from self._process.collect()

    def _build(self) -> Metric:
        labels = {"version": __version__, "python": platform.python_version(), "model": self._config.name}
        build = GaugeMetricFamily("polylogit_build_info", "What runs.", labels=list(labels))
        build.add_metric(list(labels.values()), 1)
        return build


def render(api: ApiMetrics, stats: Stats | None, *, age: float, ready: bool) -> bytes:
    """The text of /metrics. `stats`: the coordinator's last answer, `age` seconds old; None: there is none yet."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(api, stats, age=age, ready=ready))
    return generate_latest(registry)


class _Snapshot(Collector):
    """One scrape."""

    def __init__(self, api: ApiMetrics, stats: Stats | None, *, age: float, ready: bool) -> None:
        self._api = api
        self._stats = stats
        self._age = age
        self._ready = ready

    def collect(self) -> Iterable[Metric]:
        yield gauge("ready", "1 while new requests are accepted.", int(self._ready))
        yield from self._api.families()
        if self._stats is not None:
            yield gauge("stats_age_seconds", "Age of the coordinator's figures: it has not answered since.", self._age)
            yield from stats_families(self._stats)
