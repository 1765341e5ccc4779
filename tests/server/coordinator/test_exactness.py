"""The envelope that tokens are sampled from, against the whole fused distribution, over random rows: what is taken for
sure of a token is never more than its weight, and what may still be found is never more than is allowed for. Both
together are what rejection sampling needs to be exact.

Rows are of every kind that experts can show: flat and peaked, with impossible tokens, lists of one token up to the
whole vocabulary, exact ids beyond them, and every kind of coefficients, truncation and bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from server.coordinator.bounds import Rule, bound
from server.coordinator.fusion import tabulate
from server.coordinator.sampling import Rules, SamplingRule, Scores, choose
from tests.support.coordinator.alone import truncate

MANY = 1 - 1e-13
"""The largest random number: how far beyond what is sure it goes is what may still be found."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `full` float32[E, V]; `listed` of each expert's most probable tokens are shown, and the exact ids."""

    full: np.ndarray
    listed: int
    exact: np.ndarray
    coefficients: np.ndarray
    prob_space: bool
    plausibility: float | None
    rules: SamplingRule
    bias: np.ndarray

    @property
    def vocabulary(self) -> int:
        return self.full.shape[1]


@st.composite
def cases(draw) -> Case:
    vocabulary = draw(st.integers(2, 40))
    experts = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.3, 1.0, 3.0, 10.0]))
    logits = scale * (
        rng.normal(size=(experts, vocabulary)) + draw(st.sampled_from([0.0, 2.0])) * rng.normal(size=vocabulary)
    )
    if draw(st.booleans()):
        logits[:, rng.random(vocabulary) < 0.4] = -np.inf  # a grammar
    logits[:, rng.integers(vocabulary)] = 1.0
    prob_space = draw(st.booleans())
    plausibility = None if prob_space or draw(st.booleans()) else draw(st.sampled_from([0.01, 0.1, 0.9]))
    exact = np.unique(rng.integers(0, vocabulary, draw(st.integers(0, 4)))).astype(np.int32)
    bias = np.where(rng.random(len(exact)) < 0.5, rng.normal(size=len(exact)), 0).astype(np.float32)
    return Case(
        log_softmax(logits, axis=1).astype(np.float32),
        draw(st.one_of(st.integers(1, vocabulary), st.just(vocabulary), st.just(3))),
        exact,
        _coefficients(rng, draw(st.sampled_from(["shares", "ones", "one", "any", "signed"])), experts, prob_space),
        prob_space,
        plausibility,
        draw(
            st.builds(
                SamplingRule,
                st.sampled_from([0.3, 0.7, 1.0, 1.5, 2.0]),
                st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-6]),
                st.sampled_from([0, 0, 1, 3, 8, 60]),
                st.sampled_from([0.0, 0.0, 0.05, 0.5]),
            )
        ),
        bias,
    )


def _coefficients(rng, kind: str, experts: int, prob_space: bool) -> np.ndarray:
    match kind:
        case "ones":
            chosen = np.ones(experts)
        case "one":
            chosen = np.eye(experts)[0]
        case "any":
            chosen = rng.random(experts) * 3
        case "signed" if not prob_space:
            chosen = rng.normal(size=experts)
        case _:
            chosen = rng.dirichlet(np.ones(experts))
    return chosen.astype(np.float32)


def scores_of(case: Case) -> np.ndarray:
    """float64[V]: the fused scores, from their definition."""
    full = case.full.astype(np.float64)
    counting = case.coefficients != 0
    weights = case.coefficients[counting, None].astype(np.float64)
    if case.prob_space:
        return logsumexp(full[counting] + np.log(weights), axis=0)
    with np.errstate(invalid="ignore"):
        scores = (weights * full[counting]).sum(axis=0)
    scores[np.isneginf(full[counting]).any(axis=0)] = -np.inf
    if case.plausibility is not None:
        scores[full[0] < full[0].max() + np.float32(np.log(case.plausibility))] = -np.inf
    return scores


@dataclass(frozen=True, slots=True)
class Looked:
    """What the coordinator makes of a case's lists."""

    ids: np.ndarray
    table: object
    rule: Rule
    bounds: object
    scores: Scores


def look(case: Case) -> Looked:
    order = np.argsort(-case.full, axis=1, kind="stable")[:, : case.listed]
    ids = order[None].astype(np.int32)
    logprobs = np.take_along_axis(case.full, order, 1)[None]
    exact = np.append(case.exact, -1).astype(np.int32)[None]
    values = np.append(case.full[:, case.exact], np.full((len(case.full), 1), -np.inf), axis=1)
    table = tabulate(ids, logprobs, exact, values[None].astype(np.float32), case.vocabulary)
    leader = -1 if case.plausibility is None else 0
    share = np.float32(0 if case.plausibility is None else np.log(case.plausibility))
    rule = Rule(case.coefficients[None], np.array([case.prob_space]), np.array([leader]), np.array([share]))
    bounds = bound(table, logprobs[:, :, -1], rule, case.vocabulary)
    shift = np.zeros(bounds.lower.shape)
    np.put_along_axis(shift, table.exact_columns, np.append(case.bias, 0)[None], 1)
    scores = Scores(bounds.lower + shift, bounds.upper + shift, bounds.highest, np.ones(1, bool))
    return Looked(table.ids, table, rule, bounds, scores)


def biased(case: Case) -> np.ndarray:
    scores = scores_of(case)
    scores[case.exact] += case.bias
    return scores


def rules_of(case: Case, temperature: float | None = None) -> Rules:
    rule = case.rules
    return Rules(
        np.array([rule.temperature if temperature is None else temperature], np.float32),
        np.array([rule.top_p], np.float32),
        np.array([rule.top_k], np.int32),
        np.array([rule.min_p], np.float32),
    )


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(cases())
def test_bounds_hold(case):
    looked, scores = look(case), scores_of(case)
    present = looked.ids[0] >= 0
    ids = looked.ids[0, present]
    slack = 1e-5 * (1 + np.abs(np.where(np.isfinite(scores[ids]), scores[ids], 0)))
    assert (looked.bounds.lower[0, present] <= scores[ids] + slack).all()
    assert (scores[ids] <= looked.bounds.upper[0, present] + slack).all()
    outside = np.setdiff1d(np.arange(case.vocabulary), ids)
    if outside.size:
        assert scores[outside].max() <= looked.bounds.highest[0] + 1e-5
    for power in (1.0, 1 / 0.3, 0.5):
        low, high = looked.bounds.log_normalisers(looked.rule, np.array([power]))
        assert low[0] <= logsumexp(power * scores) + 1e-4
        assert logsumexp(power * scores) <= high[0] + 1e-4


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_greedy_token_is_that_of_the_whole_distribution_or_open(case):
    looked, scores = look(case), biased(case)
    chosen = choose(looked.ids, looked.scores, looked.bounds, looked.rule, rules_of(case, 0.0), np.zeros(1)).columns[0]
    if case.listed == case.vocabulary and np.isfinite(scores).any():
        assert chosen >= 0
    if chosen >= 0:
        assert scores[looked.ids[0, chosen]] >= scores.max() - 1e-5


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_envelope_holds_the_whole_distribution(case):
    looked, scores = look(case), biased(case)
    if not np.isfinite(scores).any():
        return
    choice = choose(looked.ids, looked.scores, looked.bounds, looked.rule, rules_of(case), np.array([MANY]))
    law = truncate({token: score for token, score in enumerate(scores) if np.isfinite(score)}, *case.rules)
    if np.isinf(choice.excess[0]):
        assert case.listed < case.vocabulary
        return
    weights = np.zeros(case.vocabulary)
    power = 1 / float(np.float32(case.rules.temperature))
    for token in law:
        weights[token] = np.exp(power * scores[token] - choice.shift[0])
    sure = np.zeros(case.vocabulary)
    present = looked.ids[0] >= 0
    sure[looked.ids[0, present]] = choice.sure[0, present]
    rounding = 1e-4 * weights.sum()
    assert (sure <= weights + rounding).all()
    assert (weights - sure).clip(0).sum() <= choice.excess[0] + rounding
    if case.listed == case.vocabulary:
        assert choice.columns[0] >= 0
        np.testing.assert_allclose(sure, weights, atol=rounding)
