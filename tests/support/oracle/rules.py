"""Fusion rules over full vocabularies, written from their definitions. Imports nothing of the project.

Every function returns a `Rule` for one decoding run; the gate's keeps its recurrent state between steps.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from tests.support.oracle.huggingface import Decision, Rule, Views

NO_LIMIT = float("inf")


def log_linear(coefficients: list[float]) -> Rule:
    """log p = sum_i c_i log p_i - log Z."""
    return lambda views: _constant(views, coefficients, linear=False)


def linear(coefficients: list[float]) -> Rule:
    """p = sum_i w_i p_i / Z."""
    return lambda views: _constant(views, coefficients, linear=True)


def heated(rule: Rule, temperatures: list[float]) -> Rule:
    """`rule` on experts whose logits were divided by their own temperature."""
    divisors = torch.tensor(temperatures, dtype=torch.float64)[:, None]
    return lambda views: rule(Views((views.logprobs / divisors).log_softmax(-1), views.hidden))


def select(by: str) -> Rule:
    """One expert for each token: the lowest entropy or the highest probability of its first choice."""

    def rule(views: Views) -> Decision:
        negative_entropy = (views.logprobs.exp() * views.logprobs).sum(-1)
        return _one_of(views, negative_entropy if by == "entropy" else views.logprobs.max(-1).values)

    return rule


def contrastive(expert: int, amateur: int, mu: float, plausibility: float) -> Rule:
    """log p_expert - mu log p_amateur where p_expert >= plausibility * max p_expert (arXiv 2210.15097, eq. 3)."""

    def rule(views: Views) -> Decision:
        leader = views.logprobs[:, expert]
        over = leader - leader.max(-1, keepdim=True).values - torch.tensor(plausibility, dtype=torch.float64).log()
        scores = (leader - mu * views.logprobs[:, amateur]).masked_fill(over < 0, -NO_LIMIT)
        weights = torch.zeros(views.logprobs.shape[:2], dtype=torch.float64)
        weights[:, expert], weights[:, amateur] = 1.0, -mu
        return Decision(scores.log_softmax(-1), weights, over.abs().min(-1).values)

    return rule


class GateRule:
    """Coefficients of a TorchScript gate, evaluated here on transformers' distributions and hidden states; it reads the
    first `listed` log-probabilities of each, None for all."""

    def __init__(self, path: Path, state_size: int, listed: int | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._module = torch.jit.load(str(path)).eval()
        self._size = state_size
        self._listed = listed
        self._state: Tensor | None = None

    def weigh(self, views: Views, *, forget: bool = False) -> Tensor:
        """float64[B, E] for one step; `forget` starts from the first state again."""
        rows, experts, _ = views.logprobs.shape
        if self._state is None or forget:
            self._state = torch.zeros(rows, self._size)
        best = views.logprobs.float().sort(dim=-1, descending=True, stable=True)
        projected = torch.stack([self._module.project(e, views.hidden[e]) for e in range(experts)], 1)
        values, ids = best.values[..., : self._listed], best.indices[..., : self._listed]
        coefficients, self._state = self._module(values, ids, projected, self._state)
        return coefficients.double()

    def __call__(self, views: Views) -> Decision:
        weights = self.weigh(views)
        scores = (weights[:, :, None] * views.logprobs).sum(1)
        return Decision(scores.log_softmax(-1), weights, torch.full((len(weights),), NO_LIMIT))


class GateSelect(GateRule):
    """The expert that the gate prefers, alone; with `router`, that expert (another than it) and the router as a
    product (arXiv 2601.05106)."""

    def __init__(self, path: Path, state_size: int, router: int | None = None, listed: int | None = None) -> None:
        super().__init__(path, state_size, listed)
        self._router = router

    def __call__(self, views: Views) -> Decision:
        scores = self.weigh(views)
        if self._router is not None:
            scores[:, self._router] = -NO_LIMIT
        decision = _one_of(views, scores)
        if self._router is not None:
            decision.coefficients[:, self._router] = 1.0
            mixed = (decision.coefficients[:, :, None] * views.logprobs).sum(1)
            decision.logprobs = mixed.log_softmax(-1)
        return decision


class PerRow:
    """Log-linear fusion with coefficients float64[B, E] that differ from row to row."""

    def __init__(self, coefficients: Tensor) -> None:
        self._coefficients = coefficients

    def __call__(self, views: Views) -> Decision:
        scores = (self._coefficients[:, :, None] * views.logprobs).sum(1)
        return Decision(scores.log_softmax(-1), self._coefficients, torch.full((len(scores),), NO_LIMIT))


def _constant(views: Views, coefficients: list[float], *, linear: bool) -> Decision:
    weights = torch.tensor(coefficients, dtype=torch.float64).expand(len(views.logprobs), -1)
    if linear:
        scores = (weights[:, :, None] * views.logprobs.exp()).sum(1).log()
    else:
        scores = (weights[:, :, None] * views.logprobs).sum(1)
    return Decision(scores.log_softmax(-1), weights, torch.full((len(weights),), NO_LIMIT))


def _one_of(views: Views, score: Tensor) -> Decision:
    """The distribution of the expert with the highest `score` [B, E]."""
    best = score.sort(dim=-1, descending=True)
    chosen = best.indices[:, 0]
    weights = torch.nn.functional.one_hot(chosen, score.shape[1]).double()
    picked = views.logprobs[torch.arange(len(chosen)), chosen]
    return Decision(picked, weights, best.values[:, 0] - best.values[:, 1])
