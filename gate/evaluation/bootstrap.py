"""Percentile bootstrap over prompts: how far an accuracy, or a difference of two, may be from what was measured.

Resamples prompts with replacement inside each domain (Efron 1979). All rows of one table have the same resamples, so a
difference of two rows is paired. Knows nothing of models, files or graders.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1000  # resamples at a time, to bound memory


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    """What was measured."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the intervals share a point."""
        return self.low <= other.high and other.low <= self.high


class Bootstrap:
    """Fixed resamples of the prompts of each domain; `domains` [Q] names the domain of every prompt."""

    def __init__(self, domains: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self._members = {
            name: np.flatnonzero([domain == name for domain in domains]) for name in dict.fromkeys(domains)
        }
        self._seed = seed
        self._resamples = resamples

    @property
    def domains(self) -> list[str]:
        """In the order in which they first occur."""
        return list(self._members)

    def count(self, domain: str) -> int:
        return len(self._members[domain])

    def accuracy(self, right: Sequence[float]) -> dict[str, Estimate]:
        """`right` [Q], 0 or 1 -> the share of each domain, then of "all". Raises ValueError for another length."""
        return self._means(np.asarray(right, float), lowest=0.0)

    def difference(self, right: Sequence[float], other: Sequence[float]) -> dict[str, Estimate]:
        """Mean of `right` - `other`, paired: both have the same resamples of the prompts [Q]."""
        return self._means(np.asarray(right, float) - np.asarray(other, float), lowest=-1.0)

    def _means(self, values: NDArray[np.float64], lowest: float) -> dict[str, Estimate]:
        """The mean of each domain and of all; the latter resamples within domains: their sizes are fixed. Values
        lie between `lowest` and 1."""
        if len(values) != sum(map(len, self._members.values())):
            raise ValueError(f"{len(values)} values for {sum(map(len, self._members.values()))} prompts")
        sums = {name: self._resampled_sums(values[members], number) for number, (name, members) in self._numbered()}
        found = {name: _estimate(values[self._members[name]], sums[name], lowest) for name in sums}
        found["all"] = _estimate(values, np.sum(list(sums.values()), axis=0), lowest)
        return found

    def _numbered(self) -> list[tuple[int, tuple[str, NDArray[np.intp]]]]:
        return list(enumerate(self._members.items()))

    def _resampled_sums(self, values: NDArray[np.float64], number: int) -> NDArray[np.float64]:
        """Sums [resamples] of as many values chosen with replacement, the same choices at every call."""
        generator = np.random.default_rng([self._seed, number])
        sizes = [min(_CHUNK, self._resamples - start) for start in range(0, self._resamples, _CHUNK)]
        sums = (values[generator.integers(len(values), size=(size, len(values)))].sum(axis=1) for size in sizes)
        return np.concatenate(list(sums))


def _estimate(values: NDArray[np.float64], sums: NDArray[np.float64], lowest: float) -> Estimate:
    """The mean of `values` [Q] with its percentile interval from the `sums` of resamples.

    Where all values are one, every resample is the same, and the interval is the exact one: with that confidence at
    most a share `reach` of prompts has another value (Clopper and Pearson 1934), at worst `lowest`, or 1.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sums / len(values), [tail, 1 - tail])
    mean = float(values.mean())
    if (values == values[0]).all():
        reach = 1 - tail ** (1 / len(values))
        low, high = mean - reach * (mean - lowest), mean + reach * (1 - mean)
    return Estimate(mean, float(low), float(high))
