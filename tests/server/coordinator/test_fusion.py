"""The arithmetic of fusion against references in plain Python: dictionaries, one row at a time, float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from server.coordinator.fusion import Room, fuse_whole, log_sum, tabulate
from tests.support.coordinator.lists import (
    EXPERTS,
    ROWS,
    VOCABULARY,
    distributions,
    top,
    truncated,
)


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


def test_some_rows_of_a_table():
    _, _, _, _, _, table = truncated(2, 4, 3)
    which = np.arange(ROWS) % 2 == 1
    for found, whole in zip(table.only(which), table, strict=True):
        np.testing.assert_array_equal(found, whole[which])


# --- whole rows ---


def whole_rows(seed: int) -> list[np.ndarray]:
    """Each expert's log-probabilities float32[V]."""
    return list(distributions(seed)[0].astype(np.float32))


def probabilities(*experts: list[float]) -> list[np.ndarray]:
    """Rows float32[V] of the experts' probabilities."""
    with np.errstate(divide="ignore"):
        return [np.log(np.array(each)).astype(np.float32) for each in experts]


def fuse(rows: list[np.ndarray], coefficients, *, prob_space: bool) -> np.ndarray:
    room = Room.of(len(rows[0]))
    room.scores[:] = room.sum[:] = room.scratch[:] = np.nan  # what was there before does not matter
    scores = fuse_whole(rows, [float(each) for each in coefficients], prob_space=prob_space, room=room)
    assert scores.dtype == np.float32 and scores.shape == rows[0].shape
    return scores


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_fusion_of_whole_rows_is_its_definition(prob_space, seed):
    coefficients = np.random.default_rng(seed).uniform(0.05, 1.5, EXPERTS).astype(np.float32)
    if not prob_space and seed % 2:
        coefficients[1] *= -1
    scores = fuse(whole_rows(seed), coefficients, prob_space=prob_space)
    full = distributions(seed)[0]
    if prob_space:
        expected = np.log(coefficients.astype(np.float64) @ np.exp(full))
    else:
        expected = coefficients.astype(np.float64) @ full
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    np.testing.assert_allclose(log_softmax(scores.astype(np.float64)), log_softmax(expected), atol=2e-5)


@pytest.mark.parametrize("prob_space", [False, True])
def test_the_rows_that_are_fused_are_left_as_they_are(prob_space):
    rows = [*whole_rows(7)[:1], *probabilities([0.5, 0.5] + [0.0] * (VOCABULARY - 2))]
    before = [row.copy() for row in rows]
    fuse(rows, [0.5, 0.5], prob_space=prob_space)
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("prob_space", [False, True])
def test_one_expert_alone_is_itself(prob_space):
    (row, *_) = whole_rows(8)
    np.testing.assert_allclose(fuse([row], [1.0], prob_space=prob_space), row, atol=1e-6)
    impossible = probabilities([0.0, 0.25, 0.75])
    assert fuse(impossible, [1.0], prob_space=prob_space)[0] == -np.inf


def test_an_impossible_token_stays_impossible():
    """An expert with weight that gives a token no probability at all (a grammar mask) forbids it in a product."""
    rows = probabilities([0.5, 0.5, 0.0], [0.6, 0.3, 0.1])
    for coefficients in ([1, 1], [-1, 1], [1, -1]):
        fused = fuse(rows, coefficients, prob_space=False)
        assert fused[2] == -math.inf
        assert np.isfinite(fused[:2]).all()
    mixed = fuse(rows, [0.5, 0.5], prob_space=True)
    np.testing.assert_allclose(np.exp(mixed), [0.55, 0.4, 0.05], rtol=1e-6)


def test_where_each_expert_forbids_another_token_a_product_forbids_both():
    rows = probabilities([0.0, 0.5, 0.5], [0.5, 0.0, 0.5])
    np.testing.assert_array_equal(np.isneginf(fuse(rows, [0.5, 0.5], prob_space=False)), [True, True, False])
    assert not np.isneginf(fuse(rows, [0.5, 0.5], prob_space=True)).any()
    nothing = probabilities([0.0, 1.0], [1.0, 0.0])
    assert np.isneginf(fuse(nothing, [0.5, 0.5], prob_space=False)).all()


def test_what_all_experts_forbid_a_mixture_forbids():
    rows = probabilities([0.0, 0.5, 0.5], [0.0, 0.9, 0.1])
    np.testing.assert_array_equal(np.isneginf(fuse(rows, [0.5, 0.5], prob_space=True)), [True, False, False])


def test_a_mixture_of_probabilities_too_small_for_float32_is_not_impossible():
    """A forced or biased token may be one that all experts think next to impossible."""
    rows = [np.array(row, np.float32) for row in ([-0.5, -120.0, -300.0, -np.inf], [-0.7, -121.0, -np.inf, -np.inf])]
    weights = np.array([0.25, 0.75])
    fused = fuse(rows, weights, prob_space=True)
    expected = logsumexp(np.array(rows, np.float64)[:, :3], axis=0, b=weights[:, None])
    np.testing.assert_allclose(fused[:3], expected, rtol=1e-5)
    assert np.isneginf(fused[3])


def test_the_log_of_a_sum():
    scores = distributions(3)[0, 0].astype(np.float32) + np.float32(5)
    assert log_sum(scores, np.empty_like(scores)) == pytest.approx(5.0, abs=1e-5)
    assert log_sum(np.full(4, -np.inf, np.float32), np.empty(4, np.float32)) == -np.inf
