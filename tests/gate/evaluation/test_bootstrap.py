"""Intervals against the binomial, and against scipy's."""

import numpy as np
import pytest
from scipy import stats

from gate.evaluation.bootstrap import Bootstrap


def test_interval_agrees_with_the_binomial():
    """The bootstrap of a share is binomial resampling: its quantiles are those of Binomial(n, p) / n."""
    right = [1] * 150 + [0] * 50
    found = Bootstrap(["d"] * 200).accuracy(right)["d"]
    draws = np.quantile(np.random.default_rng(1).binomial(200, 0.75, 200_000) / 200, [0.025, 0.975])
    assert found.mean == 0.75
    assert (found.low, found.high) == pytest.approx(tuple(draws), abs=0.0051)


def test_all_is_resampled_within_domains():
    """One domain all right, the other all wrong: their sizes were chosen, so the mean over both cannot vary."""
    found = Bootstrap(["a"] * 10 + ["b"] * 10).accuracy([1] * 10 + [0] * 10)["all"]
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


def test_differences_are_paired():
    """Two rows that are right on the same half, but for one prompt, differ little, however wide their own intervals."""
    half = [0, 1] * 20
    bootstrap = Bootstrap(["d"] * 40)
    assert bootstrap.accuracy(half)["d"].high > 0.6
    close = bootstrap.difference(half, [0, 0, *half[2:]])["d"]
    assert (close.low, close.mean, close.high) == (0, 1 / 40, pytest.approx(3 / 40))


def test_where_all_agree_the_interval_is_exact():
    """At a share of `low`, a hundred right answers in a row have a chance of 2.5%."""
    bootstrap = Bootstrap(["d"] * 100)
    right, wrong = bootstrap.accuracy([1] * 100)["d"], bootstrap.accuracy([0] * 100)["d"]
    assert right.low**100 == pytest.approx(0.025)
    assert (right.high, wrong.low, wrong.high) == (1, 0, pytest.approx(1 - right.low))


@pytest.mark.parametrize(("right", "other"), [(1, 0), (0, 0), (1, 1), (0, 1)])
def test_where_all_pairs_differ_alike_the_interval_is_exact(right, other):
    """A mean at the end of the interval leaves each pair its difference with a chance of which a hundred in a row have
    2.5%. The other differences lie as far away as they can: -1, or 1, or either."""
    found = Bootstrap(["d"] * 100).difference([right] * 100, [other] * 100)["d"]
    difference, chance = right - other, 0.025 ** (1 / 100)
    assert found.mean == difference
    assert found.low == pytest.approx(chance * difference - (1 - chance))
    assert found.high == pytest.approx(chance * difference + (1 - chance))


def test_intervals_are_those_of_scipy():
    """Each domain resampled by itself, and the mean of all; the ends move by the noise of 10,000 resamples."""
    rng = np.random.default_rng(0)
    domains, right = ["a"] * 40 + ["b"] * 60, (rng.random(100) < np.repeat([0.3, 0.8], [40, 60])).astype(int)
    found = Bootstrap(domains).accuracy(right)
    parts = {"a": (right[:40],), "b": (right[40:],), "all": (right[:40], right[40:])}
    for name, samples in parts.items():

        def mean(*resampled, axis=-1):
            return sum(each.sum(axis=axis) for each in resampled) / sum(each.shape[axis] for each in resampled)

        expected = stats.bootstrap(samples, mean, n_resamples=10_000, method="percentile", rng=rng).confidence_interval
        assert found[name].mean == pytest.approx(mean(*samples))
        assert (found[name].low, found[name].high) == pytest.approx(tuple(expected), abs=0.0251)
