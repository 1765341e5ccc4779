"""The arithmetic of fusion against references in plain Python: dictionaries, one row at a time, float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy as scipy_entropy

from server.coordinator.fusion import combine, entropy, fill_tail, tabulate
from tests.support.coordinator.lists import (
    EXPERTS,
    ROWS,
    VOCABULARY,
    distributions,
    exact_ids,
    exact_values,
    top,
    truncated,
)

NO_EXACT = np.full((ROWS, 1), -1, np.int32), np.full((ROWS, EXPERTS, 1), -np.inf, np.float32)


def known(ids, logprobs, exact, exact_logprobs, row: int, expert: int) -> dict[int, float]:
    """Everything one expert said about one row."""
    said = {
        int(token): float(value)
        for token, value in zip(ids[row, expert], logprobs[row, expert], strict=True)
        if token >= 0
    }
    return said | {
        int(token): float(value)
        for token, value in zip(exact[row], exact_logprobs[row, expert], strict=True)
        if token >= 0
    }


def by_id(table, values, row: int) -> dict[int, float]:
    """A row of a table as token -> value."""
    return {int(token): float(value) for token, value in zip(table.ids[row], values, strict=True) if token >= 0}


@pytest.mark.parametrize(("k", "width"), [(1, 1), (5, 4), (17, 6), (VOCABULARY, 3)])
def test_the_table_is_the_union_of_all_that_was_said(k, width):
    _, ids, logprobs, exact, values, table = truncated(k, k, width)
    for row in range(ROWS):
        said = [known(ids, logprobs, exact, values, row, expert) for expert in range(EXPERTS)]
        present = [int(token) for token in table.ids[row] if token >= 0]
        assert len(present) == len(set(present))
        assert set(present) == set().union(*said)
        assert table.ids[row, -1] == -1
        for expert in range(EXPERTS):
            expected = {token: said[expert].get(token, -math.inf) for token in present}
            assert by_id(table, table.logprobs[row, expert], row) == expected
            assert by_id(table, table.listed[row, expert], row) == {token: token in said[expert] for token in present}


def test_exact_columns_point_at_the_ids_or_at_an_empty_column():
    _, _, _, exact, _, table = truncated(1, 4, 5)
    found = np.take_along_axis(table.ids, table.exact_columns, 1)
    np.testing.assert_array_equal(found, exact)
    assert (exact == -1).any() and (exact >= 0).any()


def test_an_expert_without_a_list_adds_nothing():
    full = distributions(3)
    ids, logprobs = top(full, 5)
    ids[:, 1], logprobs[:, 1] = -1, -np.inf
    table = tabulate(
        ids, logprobs, np.full((ROWS, 1), -1, np.int32), np.full((ROWS, EXPERTS, 1), -np.inf, np.float32), 40
    )
    assert not table.listed[:, 1].any()
    for row in range(ROWS):
        assert {int(i) for i in table.ids[row] if i >= 0} == {int(i) for i in ids[row, [0, 2]].ravel()}


@pytest.mark.parametrize(("k", "width"), [(1, 1), (5, 4), (17, 6)])
def test_the_tail_is_the_kth_probability_or_the_mean_of_the_rest(k, width):
    _, ids, logprobs, exact, values, table = truncated(10 + k, k, width)
    filled = fill_tail(table, logprobs[:, :, -1], VOCABULARY)
    which = set()
    for row in range(ROWS):
        for expert in range(EXPERTS):
            said = known(ids, logprobs, exact, values, row, expert)
            mean = (1 - sum(map(math.exp, said.values()))) / (VOCABULARY - len(said))
            smallest = float(logprobs[row, expert, -1])
            which.add(mean < math.exp(smallest))
            for token, value in by_id(table, filled[row, expert], row).items():
                expected = said.get(token, min(smallest, math.log(mean)))
                assert value == pytest.approx(expected, rel=1e-4, abs=1e-5)
                assert token in said or value <= smallest
    assert True in which


def test_the_tail_is_bounded_by_the_kth_probability_where_exact_ids_hold_less_than_the_mean():
    # Flat but for one token: k = 1 lists .02, the rest share .98 evenly, which is more than .02 each.
    listed = np.float32(np.log(0.02))
    ids, logprobs = np.zeros((1, 1, 1), np.int32), np.full((1, 1, 1), listed)
    other = np.ones((1, 1, 1), np.int32), np.full((1, 1, 1), np.float32(np.log(0.9)))
    both = tabulate(
        np.concatenate([ids, other[0]], 1),
        np.concatenate([logprobs, other[1]], 1),
        np.full((1, 1), -1, np.int32),
        np.full((1, 2, 1), -np.inf, np.float32),
        11,
    )
    filled = fill_tail(both, np.array([[listed, np.log(0.9)]], np.float32), 11)
    assert by_id(both, filled[0, 0], 0)[1] == pytest.approx(math.log(0.02))
    assert by_id(both, filled[0, 1], 0)[0] == pytest.approx(math.log(0.1 / 10), rel=1e-4)


def test_a_list_that_holds_all_the_mass_leaves_almost_nothing():
    ids = np.array([[[3, 1], [2, 0]]], np.int32)
    logprobs = np.array([[[0.0, -30.0], [-0.1, -2.5]]], np.float32)
    table = tabulate(ids, logprobs, np.full((1, 1), -1, np.int32), np.full((1, 2, 1), -np.inf, np.float32), 8)
    filled = by_id(table, fill_tail(table, logprobs[:, :, -1], 8)[0, 0], 0)
    assert filled[2] == filled[0] == pytest.approx(-30.0)


def reference(full: np.ndarray, coefficients: np.ndarray, prob_space: bool) -> np.ndarray:
    """Fusion over the whole vocabulary, float64[B, V], from the definitions."""
    if prob_space:
        mixed = np.einsum("be,bev->bv", coefficients, np.exp(full))
        return np.log(mixed / mixed.sum(-1, keepdims=True))
    return log_softmax(np.einsum("be,bev->bv", coefficients, full), axis=-1)


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_with_whole_lists_fusion_is_exact(prob_space, seed):
    full = distributions(seed)
    coefficients = np.random.default_rng(seed).uniform(0.05, 1.5, (ROWS, EXPERTS)).astype(np.float32)
    if not prob_space:
        coefficients[::2, 1] *= -1
    ids, logprobs = top(full, VOCABULARY)
    exact = exact_ids(seed, 3)
    table = tabulate(ids, logprobs, exact, exact_values(full, exact), VOCABULARY)
    values = fill_tail(table, logprobs[:, :, -1], VOCABULARY)
    fused = combine(values, table, coefficients, np.full(ROWS, prob_space))
    expected = reference(full, coefficients.astype(np.float64), prob_space)
    for row in range(ROWS):
        found = by_id(table, fused[row], row)
        assert len(found) == VOCABULARY
        np.testing.assert_allclose([found[token] for token in range(VOCABULARY)], expected[row], atol=2e-4)


@pytest.mark.parametrize("k", [2, 6])
def test_truncated_fusion_against_dictionaries(k):
    _, ids, logprobs, exact, values, table = truncated(40 + k, k, 3)
    rng = np.random.default_rng(k)
    coefficients = rng.uniform(-1, 1.5, (ROWS, EXPERTS)).astype(np.float32)
    prob_space = np.arange(ROWS) % 2 == 0
    coefficients[prob_space] = np.abs(coefficients[prob_space])
    coefficients[rng.random((ROWS, EXPERTS)) < 0.2] = 0
    coefficients[~coefficients.any(axis=1), 0] = 1
    filled = fill_tail(table, logprobs[:, :, -1], VOCABULARY)
    fused = combine(filled, table, coefficients, prob_space)
    masked = 0
    for row in range(ROWS):
        said = [known(ids, logprobs, exact, values, row, expert) for expert in range(EXPERTS)]
        tails = [by_id(table, filled[row, expert], row) for expert in range(EXPERTS)]
        scores = {}
        for token in set().union(*said):
            terms = [(float(c), tails[e][token], token in said[e]) for e, c in enumerate(coefficients[row]) if c != 0]
            if any(c < 0 and not listed for c, _, listed in terms):
                masked += 1
                continue
            if prob_space[row]:
                scores[token] = math.log(sum(c * math.exp(value) for c, value, _ in terms))
            else:
                scores[token] = sum(c * value for c, value, _ in terms)
        total = logsumexp(list(scores.values())) if scores else 0.0
        for token, value in by_id(table, fused[row], row).items():
            assert value == pytest.approx(scores.get(token, -math.inf) - total, abs=1e-4)
    assert masked > 0


def test_a_row_in_a_batch_is_what_it_is_alone():
    _, _, logprobs, _, _, table = truncated(5, 6, 2)
    coefficients = np.random.default_rng(5).uniform(0.1, 1, (ROWS, EXPERTS)).astype(np.float32)
    prob_space = np.arange(ROWS) % 3 == 0
    filled = fill_tail(table, logprobs[:, :, -1], VOCABULARY)
    together = combine(filled, table, coefficients, prob_space)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone_table = type(table)(table.ids[one], table.logprobs[one], table.listed[one], table.exact_columns[one])
        alone = combine(
            fill_tail(alone_table, logprobs[one, :, -1], VOCABULARY), alone_table, coefficients[one], prob_space[one]
        )
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_an_expert_without_weight_may_say_anything(prob_space, bad):
    full = distributions(8)
    ids, logprobs = top(full, 8)
    logprobs[:, 1] = bad
    coefficients = np.tile(np.array([0.7, 0, 0.3], np.float32), (ROWS, 1))
    table = tabulate(ids, logprobs, *NO_EXACT, VOCABULARY)
    fused = combine(fill_tail(table, logprobs[:, :, -1], VOCABULARY), table, coefficients, np.full(ROWS, prob_space))
    pair = logprobs[:, [0, 2]]
    without = tabulate(ids[:, [0, 2]], pair, NO_EXACT[0], NO_EXACT[1][:, :2], VOCABULARY)
    values = fill_tail(without, pair[:, :, -1], VOCABULARY)
    expected = combine(values, without, coefficients[:, [0, 2]], np.full(ROWS, prob_space))
    for row in range(ROWS):
        kept, wanted = by_id(table, fused[row], row), by_id(without, expected[row], row)
        shift = logsumexp([kept[token] for token in wanted])
        np.testing.assert_allclose([kept[token] - shift for token in wanted], list(wanted.values()), atol=1e-5)


def test_an_impossible_token_stays_impossible():
    """An expert with weight that gives a token no probability at all (a grammar mask) forbids it in a product."""
    ids = np.array([[[0, 1, 2], [2, 1, 0]]], np.int32)
    logprobs = np.log(np.array([[[0.5, 0.5, 1e-300], [0.6, 0.3, 0.1]]])).astype(np.float32)
    logprobs[0, 0, 2] = -np.inf
    table = tabulate(ids, logprobs, np.full((1, 1), -1, np.int32), np.full((1, 2, 1), -np.inf, np.float32), 3)
    values = fill_tail(table, logprobs[:, :, -1], 3)
    for coefficients in ([1, 1], [-1, 1]):
        fused = by_id(table, combine(values, table, np.array([coefficients], np.float32), np.array([False]))[0], 0)
        assert fused[2] == -math.inf
        assert math.exp(fused[0]) + math.exp(fused[1]) == pytest.approx(1)
    mixed = by_id(table, combine(values, table, np.array([[0.5, 0.5]], np.float32), np.array([True]))[0], 0)
    assert math.exp(mixed[2]) == pytest.approx(0.3)


def test_a_mixture_of_probabilities_too_small_for_float32_is_not_impossible():
    """A forced or biased token may be one that all experts think next to impossible."""
    ids = np.array([[[0, 1], [0, 1]]], np.int32)
    logprobs = np.log(np.array([[[0.6, 0.4], [0.5, 0.5]]], np.float32))
    named = np.array([[7, 8]], np.int32), np.array([[[-120.0, -300.0], [-121.0, -np.inf]]], np.float32)
    table = tabulate(ids, logprobs, *named, VOCABULARY)
    weights = np.array([[0.25, 0.75]])
    fused = combine(table.logprobs, table, weights.astype(np.float32), np.ones(1, bool))
    everything = np.concatenate([logprobs[0], named[1][0]], axis=1).astype(np.float64)  # [E, 4]
    expected = logsumexp(everything, axis=0, b=weights.T)
    np.testing.assert_allclose(fused[0, :4], expected - logsumexp(expected), rtol=1e-5)
    assert np.isneginf(fused[0, 4:]).all()


def test_nothing_can_be_chosen_where_everything_is_masked():
    _, _, logprobs, _, _, table = truncated(6, 3, 2)
    filled = fill_tail(table, logprobs[:, :, -1], VOCABULARY)
    ones = np.ones((ROWS, EXPERTS), np.float32)
    assert (combine(filled, table, ones, np.zeros(ROWS, bool), np.zeros(table.ids.shape, bool)) == -np.inf).all()
    assert (combine(filled, table, ones * np.float32(np.nan), np.zeros(ROWS, bool)) == -np.inf).all()


def test_a_mask_takes_tokens_out_and_the_rest_sums_to_one():
    _, _, logprobs, _, _, table = truncated(7, 6, 2)
    filled = fill_tail(table, logprobs[:, :, -1], VOCABULARY)
    ones = np.ones((ROWS, EXPERTS), np.float32)
    mask = np.random.default_rng(0).random(table.ids.shape) < 0.5
    mask[:, 0] = True
    fused = combine(filled, table, ones, np.zeros(ROWS, bool), mask)
    assert (np.isfinite(fused) == (mask & (table.ids >= 0))).all()
    np.testing.assert_allclose(np.exp(fused.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


def test_entropy_of_whole_lists():
    full = distributions(9)
    _, logprobs = top(full, VOCABULARY)
    np.testing.assert_allclose(entropy(logprobs, VOCABULARY), scipy_entropy(np.exp(full), axis=-1), rtol=1e-4)


def test_entropy_of_truncated_lists_spreads_the_rest_evenly():
    _, logprobs = top(distributions(11), 6)
    mass = np.exp(logprobs.astype(np.float64))
    rest = (1 - mass.sum(-1, keepdims=True)) / (VOCABULARY - 6)
    spread = np.concatenate([mass, np.repeat(rest, VOCABULARY - 6, -1)], -1)
    np.testing.assert_allclose(entropy(logprobs, VOCABULARY), scipy_entropy(spread, axis=-1), rtol=1e-4)


def test_entropy_ignores_impossible_tokens():
    logprobs = np.log(np.array([[[0.75, 0.25, 1.0]]], np.float32))
    logprobs[0, 0, 2] = -np.inf
    assert entropy(logprobs, VOCABULARY)[0, 0] == pytest.approx(scipy_entropy([0.75, 0.25]), rel=1e-5)


def test_where_no_candidate_is_listed_by_the_negative_expert_the_estimates_have_to_do():
    ids = np.array([[[0], [1]]], np.int32)
    logprobs = np.log(np.array([[[0.9], [0.8]]], np.float32))
    table = tabulate(ids, logprobs, np.full((1, 1), -1, np.int32), np.full((1, 2, 1), -np.inf, np.float32), 4)
    values = fill_tail(table, logprobs[:, :, -1], 4)
    plausible = table.ids == 0  # what only the expert listed
    coefficients = np.array([[1.0, -0.5]], np.float32)
    fused = combine(values, table, coefficients, np.zeros(1, bool), plausible)
    assert fused[0][table.ids[0] == 0] == pytest.approx(0.0)
    everything = combine(values, table, coefficients, np.zeros(1, bool))
    assert np.isneginf(everything[0][table.ids[0] == 0])  # token 1 is listed by it, so token 0 stays masked
