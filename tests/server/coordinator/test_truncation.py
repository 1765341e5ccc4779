"""min_p, top_k and top_p on whole rows, against the naive reference. On bounds: `test_exactness`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.coordinator.truncation import Cut, truncate_whole
from tests.support.coordinator.alone import truncate

CUTS = [
    Cut(1.0, 0, 0.0),
    Cut(0.9, 0, 0.0),
    Cut(0.5, 0, 0.0),
    Cut(1e-6, 0, 0.0),
    Cut(0.999999, 0, 0.0),
    Cut(1.0, 1, 0.0),
    Cut(1.0, 7, 0.0),
    Cut(1.0, 1000, 0.0),
    Cut(1.0, 0, 0.3),
    Cut(1.0, 0, 1.0),
    Cut(0.7, 20, 0.05),
]


def kept(weights: np.ndarray, cut: Cut) -> np.ndarray:
    """The tokens that are left, whose weights are what they were."""
    left = weights.copy()
    truncate_whole(left, cut)
    tokens = np.flatnonzero(left)
    np.testing.assert_array_equal(left[tokens], weights[tokens])
    return tokens


def expected(weights: np.ndarray, cut: Cut) -> list[int]:
    best = float(weights.max())
    scores = {token: math.log(float(weight) / best) for token, weight in enumerate(weights) if weight > 0}
    return sorted(truncate(scores, 1.0, *cut))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_what_is_left_is_what_the_naive_reference_keeps(cut, scale):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        weights = np.exp(scale * rng.normal(size=200)).astype(np.float32)
        weights[rng.random(200) < 0.2] = 0
        assert kept(weights, cut).tolist() == expected(weights, cut)


@pytest.mark.parametrize("cut", [Cut(0.5, 0, 0.0), Cut(1.0, 3, 0.0), Cut(1.0, 0, 0.5), Cut(0.6, 5, 0.25)], ids=str)
def test_of_equals_those_with_the_lowest_ids_stay(cut):
    """In half precision many are equal; the numbers are such that sums are exact."""
    weights = np.array([1, 4, 2, 4, 0, 4, 4, 2, 2, 8, 1], np.float32)
    assert kept(weights, cut).tolist() == expected(weights, cut)
    same = np.full(16, 0.25, np.float32)
    assert kept(same, cut).tolist() == expected(same, cut)


def test_a_single_token_stays_whatever_is_cut():
    alone = np.array([0, 0, 3, 0], np.float32)
    for cut in CUTS:
        assert kept(alone, cut).tolist() == [2]


def test_weights_may_be_of_any_size():
    """They are in units of one of them."""
    weights = np.array([1e-20, 3e-20, 2e-38, 2e-20], np.float32)
    assert kept(weights, Cut(0.8, 0, 0.0)).tolist() == [1, 3]
    assert kept(weights * np.float32(1e38), Cut(0.8, 0, 0.0)).tolist() == [1, 3]
