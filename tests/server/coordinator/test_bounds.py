"""What the experts' lists say must hold of the fusion of the whole distributions, and must say something where it can.
Random rows of every kind are in `test_exactness`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import logsumexp

from server.coordinator.bounds import (
    CERTAIN,
    OPEN,
    UNBOUNDED,
    VERDICTS,
    Rule,
    Unknown,
    bound,
    log_power_sum,
    reportable,
    verdict,
    winner,
)
from server.coordinator.fusion import tabulate
from tests.support.coordinator.lists import EXPERTS, NO_EXACT, ROWS, VOCABULARY, truncated


def ruled(coefficients, prob_space, leader=-1, share=1.0) -> Rule:
    """A rule with the same mask in every row."""
    coefficients = np.asarray(coefficients, np.float32)
    rows = len(coefficients)
    spaces = np.broadcast_to(np.asarray(prob_space, bool), rows).copy()
    return Rule(coefficients, spaces, np.full(rows, leader, np.int64), np.full(rows, math.log(share), np.float32))


def random_rule(rng: np.random.Generator) -> Rule:
    """Shares, some of them 0, in either space."""
    coefficients = rng.dirichlet([0.7] * EXPERTS, ROWS).astype(np.float32)
    coefficients[rng.random(coefficients.shape) < 0.2] = 0
    coefficients[:, 0] += (coefficients.sum(axis=1) == 0).astype(np.float32)
    return ruled(coefficients, rng.random(ROWS) < 0.5)


def fused(full: np.ndarray, rule: Rule) -> np.ndarray:
    """Scores float64[B, V] of fusing float64[B, E, V], not normalised."""
    weights = rule.coefficients.astype(np.float64)
    mixture = np.log(np.einsum("be,bev->bv", weights, np.exp(full)).clip(1e-300))
    return np.where(rule.prob_space[:, None], mixture, np.einsum("be,bev->bv", weights, full))


@pytest.mark.parametrize("k", [1, 3, 8, 20, VOCABULARY])
@pytest.mark.parametrize("width", [1, 4])
def test_what_is_certain_is_the_winner_over_the_whole_vocabulary(k, width):
    certain = 0
    for seed in range(60):
        full, _, logprobs, _, _, table = truncated(seed, k, width)
        rule = random_rule(np.random.default_rng(seed))
        bounds = bound(table, logprobs[:, :, -1], rule, VOCABULARY)
        expected = fused(full, rule).argmax(axis=1)
        for row in range(ROWS):
            best = winner(table.ids[row], bounds.lower[row], bounds.upper[row], bounds.highest[row])
            found = verdict(table.ids[row], bounds, row)
            assert found == (CERTAIN if best >= 0 else OPEN)
            if best >= 0:
                certain += 1
                assert table.ids[row, best] == expected[row]
    assert certain > (ROWS * 60 if k == VOCABULARY else 5 * k) - 1


@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_scores_lie_within_their_bounds(k):
    full, _, logprobs, _, _, table = truncated(3, k, 3)
    rule = random_rule(np.random.default_rng(3))
    bounds, scores = bound(table, logprobs[:, :, -1], rule, VOCABULARY), fused(full, rule)
    for row in range(ROWS):
        ids = table.ids[row][table.ids[row] >= 0]
        exact = table.listed[row][rule.coefficients[row] != 0][:, : len(ids)].all(axis=0)
        assert (bounds.lower[row, : len(ids)] <= scores[row, ids] + 1e-5).all()
        assert (scores[row, ids] <= bounds.upper[row, : len(ids)] + 1e-5).all()
        np.testing.assert_allclose(bounds.lower[row, : len(ids)][exact], scores[row, ids][exact], atol=1e-5)
        np.testing.assert_array_equal((bounds.lower[row] == bounds.upper[row])[: len(ids)], exact)
        assert np.delete(scores[row], ids).max(initial=-np.inf) <= bounds.highest[row] + 1e-5
    assert (bounds.highest == -np.inf).all() == (k == VOCABULARY)


@pytest.mark.parametrize("power", [0.5, 1.0, 1 / 0.3])
def test_normalisers_lie_within_their_bounds_which_close_as_lists_grow(power):
    rule, apart = random_rule(np.random.default_rng(4)), []
    for k in (1, 8, 30, VOCABULARY):
        full, _, logprobs, _, _, table = truncated(4, k, 1)
        low, high = bound(table, logprobs[:, :, -1], rule, VOCABULARY).log_normalisers(rule, np.full(ROWS, power))
        whole = logsumexp(power * fused(full, rule), axis=1)
        assert (low <= whole + 1e-4).all() and (whole <= high + 1e-4).all()
        apart.append(float((high - low).mean()))
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] == pytest.approx(0, abs=1e-6)


def test_at_power_one_the_normaliser_of_a_mixture_is_the_sum_of_the_coefficients():
    _, _, logprobs, _, _, table = truncated(5, 2, 1)
    rule = ruled(np.random.default_rng(5).uniform(0.1, 1, (ROWS, EXPERTS)), prob_space=True)
    bounds = bound(table, logprobs[:, :, -1], rule, VOCABULARY)
    np.testing.assert_allclose(bounds.log_low, np.log(rule.coefficients.sum(axis=1)), rtol=1e-6)
    np.testing.assert_array_equal(bounds.log_low, bounds.log_high)


# --- two experts, by hand ---


def look(*experts: dict[int, float], coefficients, prob_space=False, leader=-1, share=1.0):
    """(table, rule, bounds) of one row in which each expert lists tokens with these probabilities, out of 100."""
    width = max(map(len, experts))
    best_first = [sorted(expert.items(), key=lambda pair: -pair[1]) for expert in experts]
    ids = np.array([[[token for token, _ in listed] + [-1] * (width - len(listed)) for listed in best_first]], np.int32)
    with np.errstate(divide="ignore"):
        logprobs = np.log([[[p for _, p in listed] for listed in best_first]]).astype(np.float32)
    table = tabulate(ids, logprobs, NO_EXACT[0][:1], NO_EXACT[1][:1, : len(experts)], 100)
    rule = ruled([coefficients], prob_space, leader, share)
    return table, rule, bound(table, logprobs[:, :, -1], rule, 100)


def judge(first, second, coefficients, **how) -> int:
    table, _, bounds = look(first, second, coefficients=coefficients, **how)
    return verdict(table.ids[0], bounds, 0)


def test_mixtures_bound_what_is_not_listed():
    first, second = {1: 0.6, 2: 0.3}, {3: 0.5, 4: 0.3}
    # Token 1 has 0.3 to 0.3 + 0.1 (the mass that the second list leaves is 0.2), token 3 0.25 to 0.25 + 0.05.
    assert judge(first, second, [0.5, 0.5], prob_space=True) == OPEN
    # 0.42 against at most 0.15 + 0.07.
    assert judge(first, second, [0.7, 0.3], prob_space=True) == CERTAIN
    # A token that neither lists has at most 0.1 with the first and 0.3 with the second.
    assert judge({1: 0.5, 2: 0.4}, {3: 0.3, 4: 0.25}, [0.2, 0.8], prob_space=True) == OPEN


def test_products_are_certain_only_of_a_token_that_all_list():
    # Token 1 could have any probability with the second expert, down to 0.
    assert judge({1: 0.9, 2: 0.05}, {3: 0.9, 4: 0.05}, [0.5, 0.5]) == OPEN
    # Token 2 is in both lists: 0.3 * 0.3 is more than 0.6 * 0.1 (what the second list leaves) and 0.1 * 0.6.
    assert judge({1: 0.6, 2: 0.3}, {3: 0.6, 2: 0.3}, [1, 1]) == CERTAIN
    # Token 1 could have 0.2 with the second: 0.12 is more than 0.09.
    assert judge({1: 0.6, 2: 0.3}, {3: 0.5, 2: 0.3}, [1, 1]) == OPEN


def test_equal_favourites_are_certain():
    assert judge({1: 0.2, 2: 0.1}, {1: 0.2, 4: 0.1}, [0.5, 0.5]) == CERTAIN
    assert judge({1: 0.2, 2: 0.1}, {4: 0.2, 1: 0.1}, [1.0, 0.0]) == CERTAIN


def test_a_negative_coefficient_bounds_nothing():
    assert judge({1: 0.9, 2: 0.05}, {1: 0.9, 2: 0.05}, [1.0, -0.5]) == UNBOUNDED
    _, _, bounds = look({1: 0.9, 2: 0.05}, {1: 0.9, 2: 0.05}, coefficients=[1.0, -0.5])
    assert bounds.highest[0] == bounds.log_high[0] == np.inf


def test_contrastive_decodings_mask_bounds_what_the_leader_did_not_list():
    """Token 2 has less than a tenth of what token 1 has, and so has all that the leader did not list."""
    lists = {1: 0.9, 2: 0.05}, {1: 0.5, 3: 0.4}
    assert judge(*lists, [1.0, -0.5], leader=0, share=0.1) == CERTAIN
    table, _, bounds = look(*lists, coefficients=[1.0, -0.5], leader=0, share=0.1)
    scores = dict(zip(table.ids[0].tolist(), bounds.lower[0].tolist(), strict=True))
    assert scores[1] == pytest.approx(math.log(0.9) - 0.5 * math.log(0.5))
    assert scores[2] == scores[3] == -math.inf
    assert (bounds.highest[0], bounds.outside.tokens[0]) == (-math.inf, 0)
    assert bounds.log_low[0] == bounds.log_high[0] == pytest.approx(scores[1])
    # A token with two thirds of 0.04 may still have more than 0.02.
    assert judge({1: 0.04, 2: 0.03}, {1: 0.5, 3: 0.4}, [1.0, -0.5], leader=0, share=0.5) == UNBOUNDED


def test_a_token_that_an_expert_with_weight_holds_for_impossible_is():
    first, second = {1: 0.5, 2: 0.5, 3: 0.0}, {3: 0.6, 2: 0.3, 1: 0.1}
    for coefficients, mixed in (([1, 1], False), ([-1, 1], False), ([0.5, 0.5], True), ([0, 1], False)):
        table, _, bounds = look(first, second, coefficients=coefficients, prob_space=mixed)
        column = table.ids[0].tolist().index(3)
        possible = mixed or not coefficients[0]
        assert (bounds.lower[0, column] > -np.inf) == (bounds.upper[0, column] > -np.inf) == possible


def test_lists_that_hold_all_that_is_possible_leave_nothing():
    """As a grammar does it: the last ones listed are impossible, so all others are."""
    first, second = {1: 0.5, 2: 0.5, 3: 0.0}, {2: 0.7, 1: 0.3, 4: 0.0}
    for coefficients, mixed in (([0.5, 0.5], False), ([1.5, -0.5], False), ([-0.5, 1.5], False), ([0.5, 0.5], True)):
        table, rule, bounds = look(first, second, coefficients=coefficients, prob_space=mixed)
        assert verdict(table.ids[0], bounds, 0) == CERTAIN
        assert bounds.highest[0] == -np.inf
        low, high = bounds.log_normalisers(rule, np.array([0.7]))
        assert low[0] == high[0]


def test_nothing_is_certain_without_a_coefficient():
    assert judge({1: 0.9, 2: 0.05}, {1: 0.9, 2: 0.05}, [0.0, 0.0]) == OPEN


def test_verdicts_have_names():
    assert [VERDICTS[which] for which in (CERTAIN, OPEN, UNBOUNDED)] == ["certain", "open", "unbounded"]


# --- the winner ---


@pytest.mark.parametrize(
    ("ids", "lower", "upper", "highest", "expected"),
    [
        ([7, 3, 9], [-1.0, -0.5, -2.0], None, -np.inf, 1),
        ([7, 9, 3, 4], [-1.0, -1.0, -1.0, -1.5], None, -np.inf, 2),  # of equals the lowest id
        ([9, -1, 8], [-1.0, -np.inf, -1.0], None, -2.0, 2),
        ([-1, 9], [-np.inf, -3.0], None, -np.inf, 1),
        ([5, 6], [-1.0, -3.0], [-1.0, -1.5], -np.inf, 0),
        ([5, 6], [-1.0, -3.0], [-1.0, -0.5], -np.inf, -1),  # the second may be better
        ([5, 6], [-1.0, -3.0], [-1.0, -1.0], -np.inf, -1),  # or equal
        ([5, 6], [-1.0, -3.0], [-0.2, -1.5], -np.inf, 0),  # whatever the best is exactly
        ([5, 6], [-1.0, -3.0], None, -0.5, -1),
        ([5, 6], [-1.0, -3.0], None, -1.0, -1),
        ([5, 6], [-np.inf, -np.inf], [-1.0, -2.0], -3.0, -1),
        ([5, -1], [-np.inf, -np.inf], None, -np.inf, -1),
    ],
)
def test_the_winner(ids, lower, upper, highest, expected):
    lower = np.array(lower)
    upper = lower if upper is None else np.array(upper)
    assert winner(np.array(ids, np.int32), lower, upper, highest) == expected


# --- what can be reported ---


def known(first, second, coefficients, token, wanted, tolerance=1e-3, **how) -> bool:
    table, rule, bounds = look(first, second, coefficients=coefficients, **how)
    columns = np.array([table.ids[0].tolist().index(token) if token >= 0 else -1])
    return bool(reportable(table, bounds, rule, columns, np.array([wanted], np.int32), tolerance)[0])


NEARLY_ALL = {1: 0.6, 2: 0.3, 3: 0.09999}, {1: 0.5, 2: 0.3, 3: 0.19999}


def test_what_is_reported_is_known_within_the_tolerance():
    """What is missing has a mass of 1e-5 at most."""
    for mixed in (False, True):
        assert known(*NEARLY_ALL, [0.5, 0.5], 1, 3, prob_space=mixed)
        assert not known(*NEARLY_ALL, [0.5, 0.5], 1, 4, prob_space=mixed)  # which is the fourth?
    assert not known(*NEARLY_ALL, [0.5, 0.5], 1, 3, tolerance=1e-6)
    assert known(*NEARLY_ALL, [0.5, 0.5], 1, 3, tolerance=1e-6, prob_space=True)


def test_the_token_itself_must_be_among_what_is_surely_best():
    first, second = {1: 0.6, 2: 0.39, 3: 0.00999}, {2: 0.7, 1: 0.29, 4: 0.00999}
    assert known(first, second, [0.5, 0.5], 1, 2, tolerance=0.1)
    assert not known(first, second, [0.5, 0.5], 3, 0, tolerance=0.1)
    assert known(first, second, [0.5, 0.5], 1, 0, tolerance=0.1)


def test_one_expert_alone_is_normalised_already():
    """However much its list leaves; but not with another coefficient, or a mask."""
    first, second = {1: 0.4, 2: 0.2}, {3: 0.4, 4: 0.2}
    assert known(first, second, [1.0, 0.0], 1, 1)
    assert not known(first, second, [2.0, 0.0], 1, 1)
    assert not known(first, second, [0.9, 0.1], 1, 0)


def test_nothing_is_unknown_that_nobody_wants():
    assert known({1: 0.3, 2: 0.2}, {3: 0.3, 4: 0.2}, [0.5, 0.5], 1, -1)
    assert known({1: 0.3, 2: 0.2}, {3: 0.3, 4: 0.2}, [0.5, 0.5], -1, 2)
    assert not known({1: 0.3, 2: 0.2}, {3: 0.3, 4: 0.2}, [0.5, 0.5], 1, 0)


def test_where_all_is_known_all_alternatives_are():
    full = {1: 0.5, 2: 0.5, 3: 0.0}
    assert known(full, full, [0.5, 0.5], 1, 20)
    assert known({1: 0.9, 2: 0.05}, {1: 0.5, 3: 0.4}, [1.0, -0.5], 1, 20, leader=0, share=0.1)


# --- sums of powers ---


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("power", [0.3, 0.9, 1.0, 1.7, 4.0])
@pytest.mark.parametrize("total", [0.5, 1.0, 2.5])
def test_sums_of_powers_are_bounded_and_the_bound_is_reached(prob_space, power, total):
    rng = np.random.default_rng(6)
    for _ in range(50):
        p = rng.dirichlet([rng.choice([0.05, 0.5, 5.0])] * 30, 3) * rng.uniform(0.01, 0.5, (3, 1)) + 1e-12
        weights = (total * rng.dirichlet([1.0] * 3)).astype(np.float32)
        scores = np.log(weights @ p) if prob_space else weights @ np.log(p)
        unknown = Unknown(np.array([30]), p.sum(axis=1)[None], np.log(p.max(axis=1))[None])
        assert logsumexp(power * scores) <= log_power_sum(unknown, 0, weights, prob_space, power) + 1e-9
    even = Unknown(np.array([30]), np.full((1, 3), 0.3), np.full((1, 3), np.log(0.01)))
    scores = np.full(30, np.log(0.01) * total if not prob_space else np.log(0.01 * total))
    assert log_power_sum(even, 0, weights, prob_space, power) == pytest.approx(logsumexp(power * scores), rel=1e-5)


def test_nothing_weighs_nothing():
    none = Unknown(np.zeros(1, np.int64), np.ones((1, 2)), np.zeros((1, 2)))
    empty = Unknown(np.array([5]), np.array([[0.5, 0.0]]), np.array([[-1.0, -np.inf]]))
    half = np.array([0.5, 0.5], np.float32)
    assert log_power_sum(none, 0, half, False, 1.0) == -np.inf
    assert log_power_sum(empty, 0, half, False, 1.0) == -np.inf
    assert log_power_sum(empty, 0, half, True, 1.0) == pytest.approx(math.log(0.25))
    assert log_power_sum(empty, 0, np.zeros(2, np.float32), False, 1.0) == -np.inf


def test_some_rows_of_bounds():
    _, _, logprobs, _, _, table = truncated(7, 5, 2)
    rule = random_rule(np.random.default_rng(7))
    bounds, some = bound(table, logprobs[:, :, -1], rule, VOCABULARY), np.arange(ROWS) % 3 == 0
    alone = bound(table.only(some), logprobs[some, :, -1], rule.only(some), VOCABULARY)
    for name in ("lower", "upper", "highest", "log_low", "log_high"):
        np.testing.assert_array_equal(getattr(bounds.only(some), name), getattr(alone, name))
    for name in ("outside", "unsettled"):
        for found, expected in zip(getattr(bounds.only(some), name), getattr(alone, name), strict=True):
            np.testing.assert_array_equal(found, expected)
