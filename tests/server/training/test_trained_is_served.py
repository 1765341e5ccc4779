"""What is trained is what is served: the fusion that a gate learns through (torch) and the one that samples (compiled)
give every token the same log-probability, over random lists.

Lists are of every kind that an expert can send: flat and peaked, with tokens that are impossible (-inf, as under a
grammar), with missing (-1) and repeated ids, of one token up to the whole vocabulary, and none at all where an expert
is masked. Where a list holds all the mass that float32 can see, what it leaves is noise, and so is a tail estimate
made from it in either implementation: such lists are drawn only where their k-th probability bounds the tail anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from gate.fuse import candidates, fuse, token_slots
from server.coordinator.fusion import combine, fill_tail, tabulate

BATCH = 4
TAIL_BOUND = -40.0
"""A k-th log-probability so low that the mean of what is left cannot be lower."""


@dataclass(frozen=True, slots=True)
class Case:
    """Lists `ids` int32[B, E, K] and `logprobs` float32[B, E, K], best first, `coefficients` float32[B, E]."""

    ids: np.ndarray
    logprobs: np.ndarray
    coefficients: np.ndarray
    vocabulary: int
    space: str
    temperature: float


@st.composite
def cases(draw) -> Case:
    vocabulary = draw(st.integers(1, 24))
    top_k = draw(st.one_of(st.integers(1, vocabulary), st.just(vocabulary), st.just(1)))
    experts = draw(st.integers(1, 4))
    space = draw(st.sampled_from(["logprob", "prob"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 5.0, 60.0, 500.0]))
    impossible, missing, repeated = (draw(st.sampled_from([0.0, 0.0, 0.3])) for _ in range(3))
    ids = np.full((BATCH, experts, top_k), -1, np.int32)
    logprobs = np.full((BATCH, experts, top_k), -np.inf, np.float32)
    for row, expert in np.ndindex(BATCH, experts):
        if rng.random() < 0.85:  # else the expert is masked
            ids[row, expert], logprobs[row, expert] = _list(rng, vocabulary, top_k, scale, impossible)
    gone = np.isneginf(logprobs) & (rng.random(ids.shape) < missing)
    ids[gone] = -1
    again = rng.random((BATCH, experts, top_k - 1)) < repeated
    ids[:, :, 1:] = np.where(again & (ids[:, :, 1:] >= 0), ids[:, :, :-1], ids[:, :, 1:])
    coefficients = _coefficients(rng, draw(st.sampled_from(["gate", "sharp gate", "ones", "signed"])), experts, space)
    if draw(st.booleans()):  # as everywhere but in a row whose experts are all masked
        coefficients[(ids < 0).all(axis=2)] = 0
    return Case(ids, logprobs, coefficients, vocabulary, space, draw(st.sampled_from([1.0, 0.3, 2.0])))


def _list(rng, vocabulary: int, top_k: int, scale: float, impossible: float) -> tuple[np.ndarray, np.ndarray]:
    """One expert's list; a hundredth of the mass lies outside of what it could list, unless its tail is bounded."""
    logits = scale * rng.normal(size=vocabulary)
    logits[rng.random(vocabulary) < impossible] = -np.inf
    logits[rng.integers(vocabulary)] = 0.0
    logprobs = log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[:top_k]
    if logprobs[best[-1]] > TAIL_BOUND:
        logprobs = logprobs + np.log(0.99)
    return best, logprobs[best]


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
    given_ = torch.from_numpy(case.coefficients) if coefficients is None else coefficients
    union = candidates(torch.from_numpy(case.logprobs), torch.from_numpy(case.ids).long(), case.vocabulary)
    fused = fuse(given_, union, case.space, case.temperature)
    spread = torch.full((BATCH, case.vocabulary + 1), -torch.inf)  # unused slots go into the last column
    return spread.scatter(1, union.ids.masked_fill(union.ids < 0, case.vocabulary), fused)[:, :-1]


def served(case: Case) -> np.ndarray:
    """The same, as the coordinator makes it of a tick's rows and samples from it."""
    nothing = np.full((BATCH, 1), -1, np.int32), np.full((*case.ids.shape[:2], 1), -np.inf, np.float32)
    table = tabulate(case.ids, case.logprobs, *nothing, case.vocabulary)
    values = fill_tail(table, case.logprobs[:, :, -1], case.vocabulary)
    fused = combine(values, table, case.coefficients, np.full(BATCH, case.space == "prob"))
    spread = np.full((BATCH, case.vocabulary), -np.inf)
    for row in range(BATCH):
        known = table.ids[row] >= 0
        spread[row, table.ids[row, known]] = fused[row, known]
    possible = np.isfinite(spread).any(axis=1)
    spread[possible] = log_softmax(spread[possible] / case.temperature, axis=1)
    return spread


def rounding(case: Case) -> float:
    """What float32 may lose in the largest score of a case."""
    finite = np.where(np.isfinite(case.logprobs), case.logprobs, 0)
    return 1e-4 + 2e-6 * float(np.abs(finite).max() * np.abs(case.coefficients).sum(axis=1).max()) / case.temperature


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases())
def test_every_token_has_the_same_probability(case):
    np.testing.assert_allclose(trained(case).numpy(), served(case), rtol=1e-4, atol=rounding(case))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases())
def test_gradients_are_finite(case):
    scores = torch.from_numpy(case.coefficients).clamp_min(1e-45).log().requires_grad_()
    made = trained(case, scores.softmax(1))
    made.masked_fill(made.isneginf(), 0.0).sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_gradients_are_those_of_the_fusion(space):
    torch.manual_seed(0)
    best = (3 * torch.randn(2, 3, 12, dtype=torch.float64)).log_softmax(-1).topk(5)
    union = candidates(best.values, best.indices, 12)
    weights = torch.rand(2, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    used = union.ids >= 0
    assert torch.autograd.gradcheck(lambda given_: fuse(given_, union, space, 0.7)[used], (weights,))


def test_a_token_that_an_expert_with_weight_forbids_is_impossible_in_a_product_only():
    logprobs, ids = torch.log(torch.tensor([[[0.7, 0.3, 0.0], [0.6, 0.3, 0.1]]])), torch.tensor([[[0, 1, 2]] * 2])
    union = candidates(logprobs, ids, 3)
    slot, listed = token_slots(union, torch.tensor([2]))
    assert listed.all()
    half, alone = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]])
    assert fuse(half, union, "logprob")[0, slot] == -torch.inf
    assert fuse(half, union, "prob")[0, slot].exp() == pytest.approx(0.05)
    assert fuse(alone, union, "logprob")[0, slot].exp() == pytest.approx(0.1)
