"""How a token is sampled: penalties, truncation and frequencies against naive references, random numbers against
statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

from server.coordinator.bounds import Bounds, Rule, Unknown
from server.coordinator.sampling import Choice, Penalties, Rules, Scores, choose, penalise, uniforms
from tests.support.coordinator.alone import truncate, uniform


def rules(rows: int, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> Rules:
    return Rules(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_p, np.float32),
        np.full(rows, top_k, np.int32),
        np.full(rows, min_p, np.float32),
    )


def choose_known(ids: np.ndarray, scores: np.ndarray, how: Rules, numbers: np.ndarray) -> Choice:
    """From candidates `ids` [B, U] whose `scores` [B, U] are known, and beside which there is nothing."""
    rows, scores = len(ids), scores.astype(np.float64)
    nothing, zero = np.full(rows, -np.inf), np.zeros(rows)
    none = Unknown(np.zeros(rows, np.int64), np.zeros((rows, 1)), np.full((rows, 1), -np.inf))
    bounds = Bounds(scores, scores, nothing, zero, zero, none, none)
    rule = Rule(np.ones((rows, 1), np.float32), np.zeros(rows, bool), np.full(rows, -1), np.zeros(rows, np.float32))
    return choose(ids, Scores(scores, scores, nothing, np.ones(rows, bool)), bounds, rule, how, numbers)


def sample(ids, scores, numbers, **parameters) -> np.ndarray:
    """The ids sampled for one row of `scores`, once for each of `numbers`."""
    rows = len(numbers)
    ids, scores = np.tile(np.asarray(ids, np.int32), (rows, 1)), np.tile(np.asarray(scores, np.float32), (rows, 1))
    choice = choose_known(ids, scores, rules(rows, **parameters), np.asarray(numbers, np.float64))
    assert (choice.columns >= 0).all()
    return ids[0, choice.columns]


SETTINGS = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 99},
    {"top_p": 0.5},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_what_can_be_sampled_is_what_the_naive_reference_keeps(parameters):
    rng = np.random.default_rng(1)
    ids = rng.choice(1000, 12, replace=False)
    scores = log_softmax(2 * rng.normal(size=12))
    expected = truncate(dict(zip(ids.tolist(), scores.astype(np.float32).tolist(), strict=True)), **parameters)
    sampled = sample(ids, scores, (np.arange(20_000) + 0.5) / 20_000, **parameters)
    # Evenly spaced numbers: every token is sampled its share of times, rounded.
    assert set(sampled.tolist()) <= set(expected)
    for token, share in expected.items():
        assert (sampled == token).mean() == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_samples_follow_the_distribution(parameters):
    rng = np.random.default_rng(2)
    ids, scores = np.arange(10), log_softmax(1.5 * rng.normal(size=10))
    numbers = uniforms(np.full(20_000, 17, np.uint64), np.arange(20_000, dtype=np.int32))
    sampled = sample(ids, scores, numbers, **parameters)
    expected = truncate(dict(zip(ids.tolist(), scores.astype(np.float32).tolist(), strict=True)), **parameters)
    counts = [int((sampled == token).sum()) for token in expected]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts, [20_000 * share for share in expected.values()]).pvalue > 1e-3


def test_greedy_takes_the_best_and_of_equals_the_lowest_id():
    assert sample([7, 3, 9], [-1.0, -0.5, -2.0], [0.99], temperature=0.0).tolist() == [3]
    assert sample([7, 9, 3, 4], [-1.0, -1.0, -1.0, -1.5], [0.99], temperature=0.0).tolist() == [3]
    assert sample([9, -1, 8], [-1.0, -np.inf, -1.0], [0.0], temperature=0.0).tolist() == [8]
    assert sample([-1, 9], [-np.inf, -3.0], [0.5], temperature=0.0).tolist() == [9]


def test_impossible_tokens_are_never_sampled():
    sampled = sample([5, -1, 2, 9], [-np.inf, -np.inf, -1.0, -1.0], [0.0, 0.3, 0.6, 1 - 2**-53])
    assert sampled.tolist() == [2, 2, 9, 9]


@pytest.mark.parametrize(
    "parameters", [{"temperature": 0.0}, {}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.1, "top_k": 3}], ids=str
)
def test_the_order_of_the_candidates_does_not_change_the_sample(parameters):
    """Even where several candidates are equal, as they often are in half precision, and the cut falls among them."""
    rng = np.random.default_rng(3)
    ids = rng.choice(500, 10, replace=False)
    scores = np.log(np.array([8, 4, 4, 4, 4, 4, 2, 2, 2, 1]) / 35).astype(np.float32)
    numbers = rng.random(300)
    first = sample(ids, scores, numbers, **parameters)
    for _ in range(5):
        order = rng.permutation(10)
        np.testing.assert_array_equal(sample(ids[order], scores[order], numbers, **parameters), first)
    padded = sample([*ids, -1, -1], [*scores, -np.inf, -np.inf], numbers, **parameters)
    np.testing.assert_array_equal(padded, first)


def test_rows_are_sampled_by_their_own_rules():
    ids = np.tile(np.arange(4, dtype=np.int32), (4, 1))
    scores = np.tile(np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32)), (4, 1))
    mixed = Rules(
        np.array([0, 1, 1, 1], np.float32),
        np.array([1, 1, 0.5, 1], np.float32),
        np.array([0, 0, 0, 3], np.int32),
        np.zeros(4, np.float32),
    )
    choice = choose_known(ids, scores, mixed, np.full(4, 0.9999))
    assert choice.columns.tolist() == [0, 3, 1, 2]
    assert [mixed.row(row).temperature for row in range(4)] == [0.0, 1.0, 1.0, 1.0]
    some = choice.only(np.array([False, True, False, True]))
    assert some.columns.tolist() == [3, 2] and some.sure.shape == (2, 4)


def test_where_nothing_can_be_sampled_nothing_is():
    nothing = np.full((2, 3), -np.inf)
    choice = choose_known(np.tile(np.arange(3, dtype=np.int32), (2, 1)), nothing, rules(2), np.array([0.0, 0.9]))
    assert choice.columns.tolist() == [-1, -1] and np.isinf(choice.excess).all()
    assert choose_known(np.array([[4, 5, 6]], np.int32), nothing[:1], rules(1, 0.0), np.zeros(1)).columns[0] == -1


def test_uniforms_are_splitmix64_of_seed_and_position():
    seeds = [0, 1, 2**63, 2**64 - 1, 123456789]
    positions = [0, 1, 2, 1000, 2**31 - 1]
    found = uniforms(np.array(seeds, np.uint64), np.array(positions, np.int32))
    expected = [uniform(seed, at) for seed, at in zip(seeds, positions, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_uniforms_are_uniform(along):
    count = 20_000
    running = np.arange(count)
    if along == "positions":
        numbers = uniforms(np.full(count, 42, np.uint64), running.astype(np.int32))
    else:
        numbers = uniforms(running.astype(np.uint64), np.zeros(count, np.int32))
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / math.sqrt(count)


def test_neighbouring_seeds_are_independent_and_no_shifted_copies():
    count = 4000
    streams = [uniforms(np.full(count, seed, np.uint64), np.arange(count, dtype=np.int32)) for seed in range(6)]
    for index, stream in enumerate(streams):
        for other in streams[index + 1 :]:
            assert abs(np.corrcoef(stream, other)[0, 1]) < 4.5 / math.sqrt(count)
            assert not np.intersect1d(stream, other).size


def penalised(logprobs, counts, in_prompt, *, presence=0.0, frequency=0.0, repetition=1.0) -> list[float]:
    counts = np.array([counts], np.int32)
    seen = (counts > 0) | np.array([in_prompt])
    parameters = (np.array([value], np.float32) for value in (presence, frequency, repetition))
    return penalise(np.array([logprobs], np.float32), Penalties(*parameters, counts, seen))[0].tolist()


def test_presence_and_frequency_penalties_are_openais():
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, over the generated tokens only."""
    logprobs, counts = [-1.0, -2.0, -3.0, -4.0], [0, 1, 3, 0]
    found = penalised(logprobs, counts, [False, False, False, True], presence=0.5, frequency=-0.25)
    expected = [value - count * -0.25 - (count > 0) * 0.5 for value, count in zip(logprobs, counts, strict=True)]
    assert found == pytest.approx(expected)


def test_the_repetition_penalty_also_counts_the_prompt():
    found = penalised([-1.0, -2.0, -3.0], [0, 2, 0], [True, False, False], repetition=1.5)
    assert found == pytest.approx([-1.5, -3.0, -3.0])


def test_the_repetition_penalty_does_not_reward_what_a_bias_made_positive():
    assert penalised([3.0, -3.0, 3.0], [1, 1, 0], [False] * 3, repetition=1.5) == pytest.approx([2.0, -4.5, 3.0])
    assert penalised([3.0, -3.0], [1, 1], [False] * 2, repetition=0.5) == pytest.approx([6.0, -1.5])


def test_penalties_leave_impossible_tokens_impossible():
    found = penalised([-np.inf, -1.0], [2, 0], [False, False], presence=-2.0, frequency=-2.0, repetition=0.5)
    assert found == [-math.inf, -1.0]


def test_penalties_are_each_rows_own():
    logprobs = np.full((2, 2), -1, np.float32)
    penalties = Penalties(
        np.array([1, 0], np.float32),
        np.array([0, 2], np.float32),
        np.array([1, 1], np.float32),
        np.array([[2, 0], [2, 0]], np.int32),
        np.array([[True, False], [True, False]]),
    )
    np.testing.assert_allclose(penalise(logprobs, penalties), [[-2, -1], [-5, -1]])
