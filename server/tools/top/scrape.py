"""A running server's /metrics, read and compared with an earlier reading."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.errors import ServerAway

_TIMEOUT_SECONDS = 5.0

Labels = tuple[tuple[str, str], ...]
"""Names and values of one series."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of /metrics."""

    at: float
    """When: seconds on the monotonic clock."""
    series: dict[str, dict[Labels, float]] = field(default_factory=dict)
    """Name -> labels -> value."""

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series `name` that have these labels; 0 if there is none."""
        wanted = set(labels.items())
        return sum(value for found, value in self.series.get(name, {}).items() if wanted <= set(found))

    def label(self, name: str, label: str) -> list[str]:
        """A label's values over the series `name`, in order of appearance."""
        found = (dict(labels).get(label) for labels in self.series.get(name, {}))
        return list(dict.fromkeys(value for value in found if value is not None))


@dataclass(frozen=True, slots=True)
class Change:
    """What happened between two readings of one process."""

    before: Sample
    """The earlier one; an empty one stands for the process's start."""
    after: Sample
    """The later one."""

    @property
    def seconds(self) -> float:
        """Between the two."""
        return self.after.at - self.before.at

    def grown(self, name: str, **labels: str) -> float:
        """By how much a counter has grown; from 0 if it has begun anew."""
        before, after = self.before.value(name, **labels), self.after.value(name, **labels)
        return after - before if after >= before else after

    def rate(self, name: str, **labels: str) -> float:
        """Growth a second."""
        return self.grown(name, **labels) / self.seconds if self.seconds > 0 else 0.0

    def quantile(self, name: str, share: float, **labels: str) -> float:
        """A histogram's quantile, linear within a bucket, as Prometheus's histogram_quantile; NaN without any."""
        buckets = sorted(
            (float(bound), self.grown(f"{name}_bucket", le=bound, **labels))
            for bound in self.after.label(f"{name}_bucket", "le")
        )
        if not buckets or not buckets[-1][1]:
            return math.nan
        rank, below, start = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= rank:
                if bound == math.inf:
                    return start
                return start + (bound - start) * (rank - below) / (count - below) if count > below else bound
            below, start = count, bound
        return start


class Scraper:
    """Reads a server's metrics. `url` may lack its scheme, and may end in /metrics or /v1."""

    def __init__(self, url: str, key: str | None) -> None:
        base = url if "://" in url else f"http://{url}"
        self.url = base.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS)

    def close(self) -> None:
        self._http.close()

    def read(self) -> Sample:
        """Raises ServerAway; with `lasting` where waiting will not help."""
        try:
            response = self._http.get(f"{self.url}/metrics")
        except httpx.InvalidURL as error:
            raise ServerAway(f"{self.url}: {error}", lasting=True) from None
        except httpx.UnsupportedProtocol as error:
            raise ServerAway(f"{self.url}: {error}", lasting=True) from None
        except httpx.TimeoutException:
            raise ServerAway(f"{self.url} does not answer") from None
        except httpx.HTTPError as error:
            raise ServerAway(f"{self.url} cannot be reached: {error or type(error).__name__}") from None
        if response.status_code == 401:
            raise ServerAway(f"{self.url} wants an API key: POLYLOGIT_API_KEY or --api-key-file", lasting=True)
        if response.status_code != 200:
            raise ServerAway(
                f"{self.url}/metrics: HTTP status {response.status_code}", lasting=response.is_client_error
            )
        return self._parsed(response.text)

    def _parsed(self, text: str) -> Sample:
        series: dict[str, dict[Labels, float]] = {}
        try:
            for name, labels, value in _samples(text):
                series.setdefault(name, {})[labels] = value
        except ValueError:
            series.clear()
        if "polylogit_build_info" not in series:
            raise ServerAway(f"{self.url}/metrics is not polylogit's", lasting=True)
        return Sample(time.monotonic(), series)


def _samples(text: str) -> Iterator[tuple[str, Labels, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, tuple(sample.labels.items()), sample.value
