"""A certificate must never be wrong, and must be given where the bounds allow it. The reference is the fusion of the
whole distributions."""

from __future__ import annotations

import numpy as np
import pytest

from server.coordinator.certificate import CERTAIN, OPEN, UNBOUNDED, Lists, certify
from server.coordinator.fusion import combine, fill_tail
from tests.support.coordinator.lists import EXPERTS, ROWS, VOCABULARY, truncated


def verdicts(ids, logprobs, table, coefficients, prob_space) -> list[int]:
    return [
        certify(
            Lists(ids[row, :, 0], logprobs[row, :, -1], table.ids[row], table.logprobs[row], table.listed[row]),
            coefficients[row],
            prob_space[row],
            VOCABULARY,
        )
        for row in range(len(ids))
    ]


def whole(full, coefficients, prob_space) -> np.ndarray:
    """Most probable token int[B] of fusing float64[B, E, V]."""
    mixed = np.einsum("be,bev->bv", coefficients, np.where(prob_space[:, None, None], np.exp(full), full))
    return mixed.argmax(axis=1)


@pytest.mark.parametrize("k", [1, 3, 8, 20, VOCABULARY])
@pytest.mark.parametrize("width", [0, 4])
def test_what_is_certain_is_the_winner_over_the_whole_vocabulary(k, width):
    certain = 0
    for seed in range(60):
        full, ids, logprobs, _, _, table = truncated(seed, k, max(width, 1))
        rng = np.random.default_rng(seed)
        coefficients = rng.dirichlet([0.7] * EXPERTS, ROWS).astype(np.float32)
        coefficients[rng.random(coefficients.shape) < 0.2] = 0
        coefficients[:, 0] += (coefficients.sum(axis=1) == 0).astype(np.float32)
        prob_space = rng.random(ROWS) < 0.5
        fused = combine(fill_tail(table, logprobs[:, :, -1], VOCABULARY), table, coefficients, prob_space)
        winners = table.ids[np.arange(ROWS), fused.argmax(axis=1)]
        expected = whole(full, coefficients, prob_space)
        for row, verdict in enumerate(verdicts(ids, logprobs, table, coefficients, prob_space)):
            assert verdict in (CERTAIN, OPEN)
            if verdict == CERTAIN:
                certain += 1
                assert winners[row] == expected[row]
    assert certain > (ROWS * 60 if k == VOCABULARY else 5 * k) - 1


def lists(*experts: dict[int, float]) -> Lists:
    """Two experts' lists of two tokens, as `certify` takes them."""
    tokens = sorted({token for expert in experts for token in expert})
    candidates = np.array([*tokens, -1], np.int32)
    values = np.array([[expert.get(token, 0.0) for token in tokens] + [0.0] for expert in experts])
    with np.errstate(divide="ignore"):
        values = np.log(values).astype(np.float32)
    tops = np.array([max(expert, key=expert.__getitem__) for expert in experts], np.int32)
    smallest = np.log([min(expert.values()) for expert in experts]).astype(np.float32)
    return Lists(tops, smallest, candidates, values, values > -np.inf)


def judge(first, second, coefficients, *, prob_space):
    return certify(lists(first, second), np.array(coefficients, np.float32), prob_space, 100)


def test_mixtures_bound_what_is_not_listed():
    first, second = {1: 0.6, 2: 0.3}, {3: 0.5, 4: 0.3}
    # Token 1 has 0.3 to 0.3 + 0.1 (the mass that the second list leaves is 0.2), token 3 0.25 to 0.25 + 0.05.
    assert judge(first, second, [0.5, 0.5], prob_space=True) == OPEN
    # 0.42 against at most 0.15 + 0.07.
    assert judge(first, second, [0.7, 0.3], prob_space=True) == CERTAIN
    # A token that neither lists has at most 0.1 with the first and 0.2 with the second.
    assert judge({1: 0.5, 2: 0.4}, {3: 0.3, 4: 0.25}, [0.2, 0.8], prob_space=True) == OPEN


def test_products_are_certain_only_of_a_token_that_all_list():
    # Token 1 could have any probability with the second expert, down to 0.
    assert judge({1: 0.9, 2: 0.05}, {3: 0.9, 4: 0.05}, [0.5, 0.5], prob_space=False) == OPEN
    # Token 2 is in both lists: 0.3 * 0.3 is more than 0.6 * 0.1 (what the second list leaves) and 0.1 * 0.6.
    assert judge({1: 0.6, 2: 0.3}, {3: 0.6, 2: 0.3}, [1, 1], prob_space=False) == CERTAIN
    # Token 1 could have 0.2 with the second: 0.12 is more than 0.09.
    assert judge({1: 0.6, 2: 0.3}, {3: 0.5, 2: 0.3}, [1, 1], prob_space=False) == OPEN


def test_equal_favourites_are_certain():
    assert judge({1: 0.2, 2: 0.1}, {1: 0.2, 4: 0.1}, [0.5, 0.5], prob_space=False) == CERTAIN
    assert judge({1: 0.2, 2: 0.1}, {4: 0.2, 1: 0.1}, [1.0, 0.0], prob_space=False) == CERTAIN


def test_a_negative_coefficient_bounds_nothing():
    assert judge({1: 0.9, 2: 0.05}, {1: 0.9, 2: 0.05}, [1.0, -0.5], prob_space=False) == UNBOUNDED


def test_nothing_is_certain_without_a_coefficient():
    assert judge({1: 0.9, 2: 0.05}, {1: 0.9, 2: 0.05}, [0.0, 0.0], prob_space=False) == OPEN
