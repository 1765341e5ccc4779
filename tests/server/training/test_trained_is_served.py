"""What is trained is what is served: the fusion that a gate learns through (torch, lists) against fusion over the whole
vocabulary (NumPy, float64), which is what samples.

Distributions are of every kind that an expert can have: flat and peaked, with tokens that are impossible (as under a
grammar) and missing from its list then, and none at all where an expert is masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from gate.fuse import Candidates, candidates, fuse
from gate.training.records import Response
from server.coordinator.bounds import Rule, bound
from server.coordinator.fusion import tabulate

BATCH = 4


@dataclass(frozen=True, slots=True)
class Case:
    """Experts' distributions `logprobs` float64[B, E, V], which list their `top_k` best, `coefficients` float32[B, E],
    and the `tokens` int64[B] of a response. A list leaves out the impossible tokens that are `gone` bool[B, E, V]."""

    logprobs: np.ndarray
    gone: np.ndarray
    top_k: int
    coefficients: np.ndarray
    tokens: np.ndarray
    space: str
    temperature: float

    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """int64[B, E, K] and float32[B, E, K], best first."""
        order = np.argsort(-self.logprobs, axis=2, kind="stable")[:, :, : self.top_k]
        values = np.take_along_axis(self.logprobs, order, 2).astype(np.float32)
        return np.where(np.take_along_axis(self.gone, order, 2), -1, order), values

    def own(self) -> np.ndarray:
        """float32[B, E]: the tokens' log-probabilities."""
        return self.logprobs[np.arange(len(self.tokens)), :, self.tokens].astype(np.float32)

    def union(self) -> Candidates:
        """The candidates in training."""
        (ids, values), own = self.lists(), self.own()
        rest = Response(0, 0, "", 0, 1.0, 0.0, self.tokens, ids, values, [], own).rest
        given_ = (torch.from_numpy(array) for array in (values, ids, rest, self.tokens, own))
        return candidates(*given_, self.logprobs.shape[2])

    def whole(self) -> np.ndarray:
        """Fused log-probabilities float64[B, V]; -inf for tokens that are impossible."""
        scores = self.scores(self.logprobs.astype(np.float64))
        possible = np.isfinite(scores).any(1)
        scores[possible] = log_softmax(scores[possible] / self.temperature, axis=1)
        return scores

    def scores(self, logprobs: np.ndarray) -> np.ndarray:
        """The fused scores [B, U] of `logprobs` [B, E, U]; -inf where one is impossible."""
        weights = self.coefficients.astype(np.float64)[:, :, None]
        counts = weights != 0
        if self.space == "logprob":
            scores = np.where(counts, weights * np.where(np.isneginf(logprobs), 0, logprobs), 0).sum(1)
            return np.where((counts & np.isneginf(logprobs)).any(1), -np.inf, scores)
        with np.errstate(divide="ignore"):
            return logsumexp(np.where(counts, np.log(np.abs(weights)) + logprobs, -np.inf), axis=1)

    def rounding(self) -> float:
        """What float32 may lose in the largest score."""
        finite = np.where(np.isfinite(self.logprobs), self.logprobs, 0)
        largest = np.abs(finite).max() * np.abs(self.coefficients).sum(axis=1).max()
        return 1e-4 + 2e-6 * float(largest) / self.temperature


@st.composite
def cases(draw, *, whole: bool) -> Case:
    vocabulary = draw(st.integers(1, 24))
    top_k = vocabulary if whole else draw(st.integers(1, vocabulary))
    experts = draw(st.integers(1, 4))
    space = draw(st.sampled_from(["logprob", "prob"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 5.0, 60.0, 500.0]))
    impossible, missing = (draw(st.sampled_from([0.0, 0.0, 0.3])) for _ in range(2))
    logprobs = np.full((BATCH, experts, vocabulary), -np.inf)
    for row, expert in np.ndindex(BATCH, experts):
        if rng.random() < 0.85:  # else the expert is masked
            logits = scale * rng.normal(size=vocabulary)
            logits[rng.random(vocabulary) < impossible] = -np.inf
            logits[rng.integers(vocabulary)] = 0.0
            logprobs[row, expert] = log_softmax(logits)
    masked = np.isneginf(logprobs).all(axis=2)
    gone = np.isneginf(logprobs) & ((rng.random(logprobs.shape) < missing) | masked[:, :, None])
    coefficients = _coefficients(rng, draw(st.sampled_from(["gate", "sharp gate", "ones", "signed"])), experts, space)
    if draw(st.booleans()):  # as everywhere but in a row whose experts are all masked
        coefficients[masked] = 0
    temperature = draw(st.sampled_from([1.0, 0.3, 2.0]))
    return Case(logprobs, gone, top_k, coefficients, rng.integers(vocabulary, size=BATCH), space, temperature)


def _coefficients(rng, kind: str, experts: int, space: str) -> np.ndarray:
    """Negative ones only in `logprob` space: elsewhere the configuration and the gate's runner refuse them."""
    noise = rng.normal(size=(BATCH, experts))
    match kind:
        case "ones":
            chosen = np.ones_like(noise)
        case "signed" if space == "logprob":
            chosen = noise * (rng.random(noise.shape) < 0.8)
        case "sharp gate":
            chosen = np.exp(log_softmax(60 * noise, axis=1))
        case _:
            chosen = np.exp(log_softmax(noise, axis=1))
    return chosen.astype(np.float32)


def trained(case: Case, coefficients: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities [B, V]; -inf for tokens that are no candidates."""
    union, vocabulary = case.union(), case.logprobs.shape[2]
    given_ = torch.from_numpy(case.coefficients) if coefficients is None else coefficients
    fused = fuse(given_, union, case.space, case.temperature)
    spread = torch.full((BATCH, vocabulary + 1), -torch.inf)  # unused slots go into the last column
    return spread.scatter(1, union.ids.masked_fill(union.ids < 0, vocabulary), fused)[:, :-1]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases(whole=True))
def test_with_whole_lists_every_token_has_the_same_probability(case):
    expected = case.whole()
    nothing = (case.coefficients == 0).all(axis=1)  # serving ends such a sequence before it fuses
    np.testing.assert_allclose(trained(case).numpy()[~nothing], expected[~nothing], rtol=1e-4, atol=case.rounding())


def assert_within_bounds(case: Case) -> None:
    """What training takes for the normaliser, as its candidate with the largest score tells it, is among what the
    coordinator holds for possible from the same lists."""
    (ids, values), union = case.lists(), case.union()
    exact = case.tokens[:, None].astype(np.int32), case.own()[:, :, None]
    table = tabulate(ids.astype(np.int32), values, *exact, case.logprobs.shape[2])
    rows = len(case.tokens)
    no_mask = np.full(rows, -1, np.int64), np.zeros(rows, np.float32)
    rule = Rule(case.coefficients, np.full(rows, case.space == "prob"), *no_mask)
    bounds = bound(table, values[:, :, -1], rule, case.logprobs.shape[2])
    low, high = bounds.log_normalisers(rule, np.full(rows, 1 / case.temperature))
    fused = fuse(torch.from_numpy(case.coefficients), union, case.space, case.temperature).numpy()
    possible = np.flatnonzero(np.isfinite(fused).any(1) & (case.coefficients != 0).any(1))
    told = possible, fused[possible].argmax(1)
    found = case.scores(union.logprobs.numpy())[told] / case.temperature - fused[told]
    assert (low[possible] - case.rounding() <= found).all()
    assert (found <= high[possible] + case.rounding()).all()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases(whole=False))
def test_the_normaliser_is_within_the_coordinators_bounds(case):
    masked = np.isneginf(case.logprobs).all(axis=2)  # these have no weight where it serves
    assert_within_bounds(replace(case, coefficients=np.where(masked, np.float32(0), np.abs(case.coefficients))))


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_so_it_is_where_tails_are_heavy(space, temperature):
    assert_within_bounds(heavy(space, temperature))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases(whole=False))
def test_gradients_are_finite(case):
    scores = torch.from_numpy(case.coefficients).clamp_min(1e-45).log().requires_grad_()
    made = trained(case, scores.softmax(1))
    made.masked_fill(made.isneginf(), 0.0).sum().backward()
    assert scores.grad.isfinite().all()


def heavy(space: str, temperature: float = 1.0, rows: int = 400) -> Case:
    """Rows with heavy tails, as those of open-ended text: a few percent of the mass outside lists of 32."""
    rng = np.random.default_rng(0)
    common = 1.5 * rng.normal(size=(rows, 1, 4000))
    best = 10 * rng.random((rows, 1, 4000)) ** 80
    logprobs = log_softmax(common + best + 0.8 * rng.normal(size=(rows, 3, 4000)), axis=2)
    coefficients = rng.dirichlet(np.ones(3), size=rows).astype(np.float32)
    tokens = np.array([rng.choice(4000, p=np.exp(row)) for row in logprobs[:, 0]])
    return Case(logprobs, np.zeros(logprobs.shape, bool), 32, coefficients, tokens, space, temperature)


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_what_no_list_holds_counts(space):
    """The log-probability of a response's token, also of one that nobody listed: near the true one where what is
    outside of the candidates counts, far from it where it does not."""
    case = heavy(space)
    union, rows = case.union(), np.arange(400)
    told = case.whole()[rows, case.tokens]
    coefficients = torch.from_numpy(case.coefficients)
    found = fuse(coefficients, union, space)[rows, union.token_slot].numpy()
    alone = fuse(coefficients, _only_candidates(union), space)[rows, union.token_slot].numpy()
    error, without = np.abs(found - told), np.abs(alone - told)
    print(f"\n{space}: {error.mean():.3f} nats on average, {without.mean():.3f} if it did not count")
    assert error.mean() < (0.2 if space == "logprob" else 0.02) * without.mean()


def _only_candidates(union: Candidates) -> Candidates:
    """As if there were no other tokens."""
    outside = replace(union.outside, count=torch.zeros_like(union.outside.count))
    return replace(union, outside=outside)


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_gradients_are_those_of_the_fusion(space, temperature):
    torch.manual_seed(0)
    logprobs = (3 * torch.randn(2, 3, 12, dtype=torch.float64)).log_softmax(-1)
    best, tokens = logprobs.topk(3), torch.tensor([3, 7])
    rest = (1 - best.values.exp().sum(2)).log()
    own = logprobs[torch.arange(2), :, tokens]
    union = candidates(best.values, best.indices, rest, tokens, own, 12)
    logits = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    used = union.ids >= 0
    assert torch.autograd.gradcheck(lambda given_: fuse(given_.softmax(1), union, space, temperature)[used], (logits,))


def test_a_token_that_an_expert_with_weight_forbids_is_impossible_in_a_product_only():
    logprobs = np.log(np.array([[[0.7, 0.3, 1e-300], [0.6, 0.3, 0.1]]]))
    logprobs[0, 0, 2] = -np.inf
    half, alone = np.array([[0.5, 0.5]], np.float32), np.array([[0.0, 1.0]], np.float32)

    def told(coefficients: np.ndarray, space: str) -> float:
        case = Case(logprobs, np.zeros(logprobs.shape, bool), 3, coefficients, np.array([2]), space, 1.0)
        union = case.union()
        return float(fuse(torch.from_numpy(coefficients), union, space)[0, union.token_slot].exp())

    assert told(half, "logprob") == 0
    assert told(half, "prob") == pytest.approx(0.05)
    assert told(alone, "logprob") == pytest.approx(0.1)
