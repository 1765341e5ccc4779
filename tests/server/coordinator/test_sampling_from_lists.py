"""Tokens that are sampled from lists much shorter than the vocabulary, and from whole rows where the lists leave them
open, together follow the law of the whole fused distribution."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, logsumexp

from server.coordinator.bounds import Rule, bound
from server.coordinator.fusion import CandidateTable, Room, fuse_whole, tabulate
from server.coordinator.sampling import (
    Choice,
    RowChoice,
    Rules,
    SamplingRule,
    Scores,
    choose,
    choose_whole,
    uniforms,
)
from tests.support.coordinator.alone import truncate

VOCABULARY, SAMPLES = 40, 20_000


@dataclass(frozen=True, slots=True)
class Row:
    """`full` float32[E, V]; each expert lists its `listed` most probable tokens, and all of them those with a `bias`:
    token -> what is added to its score."""

    full: np.ndarray
    listed: int
    coefficients: np.ndarray
    prob_space: bool
    bias: dict[int, float] = field(default_factory=dict)

    def law(self, rule: SamplingRule) -> dict[int, float]:
        """token -> probability of what is sampled from the whole distribution, by the naive reference."""
        full, weights = self.full.astype(np.float64), self.coefficients.astype(np.float64)
        scores = logsumexp(full, axis=0, b=weights[:, None]) if self.prob_space else weights @ full
        biased = {token: score + self.bias.get(token, 0.0) for token, score in enumerate(scores.tolist())}
        return truncate(biased, *rule)

    def scores(self) -> np.ndarray:
        """float32[V]: those of the whole row, with the bias."""
        scores = fuse_whole(
            list(self.full), self.coefficients.tolist(), prob_space=self.prob_space, room=Room.of(self.full.shape[1])
        )
        for token, bias in self.bias.items():
            scores[token] += np.float32(bias)
        return scores

    def rule(self, rows: int) -> Rule:
        return Rule(
            np.tile(self.coefficients, (rows, 1)),
            np.full(rows, self.prob_space),
            np.full(rows, -1),
            np.zeros(rows, np.float32),
        )

    def table(self, rows: int, shuffle: np.random.Generator | None = None) -> tuple[CandidateTable, np.ndarray]:
        """(candidates, the last log-probability of each list), alike in each row; with `shuffle` in any order."""
        ids = np.argsort(-self.full, axis=1, kind="stable")[:, : self.listed]
        smallest = np.take_along_axis(self.full, ids[:, -1:], 1)[:, 0]
        if shuffle is not None:
            ids = shuffle.permuted(ids, axis=1)
        logprobs = np.take_along_axis(self.full, ids, 1)
        exact = np.array([[*self.bias, -1]], np.int32)
        values = np.append(self.full[:, list(self.bias)], np.full((len(ids), 1), -np.inf, np.float32), axis=1)
        table = tabulate(ids[None].astype(np.int32), logprobs[None], exact, values[None], VOCABULARY)
        repeated = CandidateTable(*(np.repeat(field, rows, axis=0) for field in table))
        return repeated, np.tile(smallest, (rows, 1))

    def choose(self, rule: SamplingRule, numbers: np.ndarray, shuffle=None) -> tuple[CandidateTable, Choice]:
        rows = len(numbers)
        table, smallest = self.table(rows, shuffle)
        bounds = bound(table, smallest, self.rule(rows), VOCABULARY)
        shift = np.zeros(bounds.lower.shape)
        np.put_along_axis(shift, table.exact_columns, np.array([[*self.bias.values(), 0.0]]), 1)
        scores = Scores(bounds.lower + shift, bounds.upper + shift, bounds.highest, np.ones(rows, bool))
        kinds = (np.float32, np.float32, np.int32, np.float32)
        rules = Rules(*(np.full(rows, value, kind) for value, kind in zip(rule, kinds, strict=True)))
        return table, choose(table.ids, scores, bounds, self.rule(rows), rules, numbers)

    def sample(
        self, rule: SamplingRule, numbers: np.ndarray, others: np.ndarray, shuffle=None
    ) -> tuple[np.ndarray, int]:
        """(tokens, for how many of them the whole row was needed)."""
        table, choice = self.choose(rule, numbers, shuffle)
        tokens = table.ids[np.arange(len(numbers)), choice.columns]
        needed, scores = np.flatnonzero(choice.columns < 0), self.scores()
        for row in needed.tolist():
            begun = RowChoice(table.ids[row], choice.sure[row], float(choice.shift[row]), float(choice.excess[row]))
            tokens[row] = from_whole(scores, rule, begun, float(others[row]))
        return tokens, len(needed)


def from_whole(scores: np.ndarray, rule: SamplingRule, begun: RowChoice, number: float) -> int:
    """`choose_whole`, which leaves the scores as they are."""
    kept = scores.copy()
    token = choose_whole(scores, rule, begun, number, np.empty_like(scores))
    np.testing.assert_array_equal(scores, kept)
    return token


def row(seed: int, prob_space: bool, listed: int = 4, scale: float = 1.0, total: float = 1.0) -> Row:
    """Two experts who agree in part, and together leave much to tokens that neither lists."""
    rng = np.random.default_rng(seed)
    logits = scale * (rng.normal(size=(2, VOCABULARY)) + rng.normal(size=VOCABULARY))
    coefficients = np.array([0.6, 0.4], np.float32) * np.float32(total)
    return Row(log_softmax(logits, axis=1).astype(np.float32), listed, coefficients, prob_space)


def streams(seed: int, count: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """What a sequence samples by: (numbers, further numbers)."""
    seeds, places = np.full(count, seed, np.uint64), np.arange(count, dtype=np.int32)
    return uniforms(seeds, places), uniforms(~seeds, places)


def assert_follows(tokens: np.ndarray, law: dict[int, float]) -> None:
    """By a chi-square test, with what is expected less than ten times in one cell."""
    assert set(tokens.tolist()) <= set(law)
    counts = np.array([(tokens == token).sum() for token in law], np.float64)
    expected = len(tokens) * np.array(list(law.values()))
    rare = expected < 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    if len(expected) > 1:
        assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("seed", range(2))
def test_samples_follow_the_law_of_the_whole_distribution(prob_space, temperature, seed):
    each, rule = row(seed, prob_space), SamplingRule(temperature, 1.0, 0, 0.0)
    tokens, needed = each.sample(rule, *streams(100 + seed))
    law = each.law(rule)
    listed = {token for token in each.table(1)[0].ids[0].tolist() if token >= 0}
    tail = sum(share for token, share in law.items() if token not in listed)
    assert tail > (0.02 if temperature < 1 else 0.2)
    assert np.isin(tokens, list(listed), invert=True).mean() == pytest.approx(tail, abs=0.01)
    assert needed < SAMPLES
    assert_follows(tokens, law)


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        SamplingRule(1.0, 0.8, 0, 0.0),
        SamplingRule(1.0, 0.3, 0, 0.0),
        SamplingRule(1.5, 1.0, 3, 0.0),
        SamplingRule(1.5, 1.0, 12, 0.0),
        SamplingRule(0.7, 1.0, 0, 0.1),
        SamplingRule(1.2, 0.9, 15, 0.05),
    ],
    ids=str,
)
def test_truncated_samples_do_too(prob_space, rule):
    each = row(7, prob_space)
    tokens, _ = each.sample(rule, *streams(7, 8000))
    assert_follows(tokens, each.law(rule))


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("bias", [-100.0, -8.0, 3.0, 100.0])
def test_biased_samples_do_too(prob_space, temperature, bias):
    """Also where the lists leave nothing but the tail."""
    each = row(11, prob_space)
    listed = [int(token) for token in each.table(1)[0].ids[0] if token >= 0]
    each = replace(each, bias=dict.fromkeys(listed, bias))
    rule = SamplingRule(temperature, 1.0, 0, 0.0)
    tokens, _ = each.sample(rule, *streams(11, 5000))
    assert_follows(tokens, each.law(rule))


@pytest.mark.parametrize("total", [0.5, 2.0])
def test_coefficients_need_not_sum_to_one(total):
    each, rule = row(3, False, total=total), SamplingRule(1.0, 1.0, 0, 0.0)
    tokens, _ = each.sample(rule, *streams(3))
    assert_follows(tokens, each.law(rule))


def test_with_a_negative_coefficient_the_whole_row_decides():
    each = row(4, False)
    each.coefficients[:] = [1.5, -0.5]
    rule = SamplingRule(1.0, 1.0, 0, 0.0)
    tokens, needed = each.sample(rule, *streams(4, 5000))
    assert needed == 5000
    assert_follows(tokens, each.law(rule))


@pytest.mark.parametrize("prob_space", [False, True])
def test_peaked_rows_are_seldom_needed_whole(prob_space):
    each, rule = row(5, prob_space, listed=12, scale=4.0), SamplingRule(1.0, 1.0, 0, 0.0)
    tokens, needed = each.sample(rule, *streams(5))
    assert needed < 0.02 * SAMPLES
    assert_follows(tokens, each.law(rule))


@pytest.mark.parametrize("prob_space", [False, True])
def test_longer_lists_need_fewer_whole_rows(prob_space):
    rule, numbers = SamplingRule(1.0, 1.0, 0, 0.0), streams(6, 4000)
    needed = [row(6, prob_space, listed).sample(rule, *numbers)[1] for listed in (2, 6, 14, 30, VOCABULARY)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] > 1000 and needed[-1] == 0


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("rule", [SamplingRule(1.3, 1.0, 0, 0.0), SamplingRule(1.0, 0.8, 6, 0.02)], ids=str)
def test_the_order_of_the_lists_does_not_change_the_sample(prob_space, rule):
    each, numbers = row(8, prob_space), streams(8, 2000)
    first, _ = each.sample(rule, *numbers)
    for seed in range(4):
        again, _ = each.sample(rule, *numbers, shuffle=np.random.default_rng(seed))
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("prob_space", [False, True])
@pytest.mark.parametrize("listed", [1, 4, 12])
def test_greedy_is_the_whole_distributions_best(prob_space, listed):
    rule, settled = SamplingRule(0.0, 1.0, 0, 0.0), 0
    for seed in range(60):
        each = row(seed, prob_space, listed)
        tokens, needed = each.sample(rule, np.zeros(1), np.zeros(1))
        settled += 1 - needed
        assert tokens[0] == each.scores().argmax()
    assert settled > (10 if listed > 1 else 0)


# --- whole rows ---

NOT_BEGUN = RowChoice(np.array([-1], np.int32), np.zeros(1), 0.0, np.inf)


@pytest.mark.parametrize(
    "rule", [SamplingRule(1.0, 1.0, 0, 0.0), SamplingRule(0.6, 0.9, 0, 0.0), SamplingRule(2.0, 0.9, 9, 0.02)], ids=str
)
def test_a_whole_row_alone_is_sampled_by_its_law(rule):
    each = row(9, False)
    scores = each.scores()
    tokens = np.array([from_whole(scores, rule, NOT_BEGUN, number) for number in streams(9, 8000)[0]])
    assert_follows(tokens, each.law(rule))


def test_a_whole_row_takes_the_best_at_temperature_zero_and_of_equals_the_lowest_id():
    rule = SamplingRule(0.0, 1.0, 0, 0.0)
    assert from_whole(np.array([-2, -1, -3, -1], np.float32), rule, NOT_BEGUN, 0.99) == 1


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_a_whole_row_never_gives_an_impossible_token(number):
    scores = np.array([-np.inf, -1.0, -np.inf, -1.0, -np.inf], np.float32)
    for rule in (SamplingRule(1.0, 1.0, 0, 0.0), SamplingRule(1.0, 0.4, 0, 0.0)):
        assert from_whole(scores, rule, NOT_BEGUN, number) in (1, 3)


def test_a_whole_row_goes_on_where_the_lists_left_off():
    """Token 1 was sure to have all its weight, token 0 a third of it; 1.2 units were allowed for the rest."""
    scores = np.log(np.array([0.3, 0.5, 0.2], np.float32))
    rule, ids, sure = SamplingRule(1.0, 1.0, 0, 0.0), np.array([1, 0, -1], np.int32), np.array([0.5, 0.1, 0.0])

    def token(excess: float, number: float) -> int:
        return from_whole(scores, rule, RowChoice(ids, sure, 0.0, excess), number)

    assert [token(excess, 0.9) for excess in (0.0, 0.19, 0.21, 0.39)] == [0, 0, 2, 2]
    assert [token(0.41, number) for number in (0.0, 0.29, 0.31, 0.79, 0.81)] == [0, 0, 1, 1, 2]
