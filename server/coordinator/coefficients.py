"""Fusion policies as arithmetic: the coefficients that each rule of `server.policy` gives the experts, batched over
rows.

Letters: B rows, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int64
from server.policy import (
    Contrastive,
    FusionRoute,
    Gate,
    Perplexity,
    Policy,
    Product,
    Proxy,
    Select,
    Single,
    Space,
    Uniform,
    Weights,
    essential,
)

_HOPELESS = np.float32(-1e30)
"""A score that leaves a softmax nothing beside any other, and shares evenly among its like."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rule may look at, for rows of one policy."""

    available: Bool
    """[B, E]: experts that take part and gave a usable row."""

    confidence: Float32
    """[B, E]: the log-probability of each expert's most probable token."""

    entropy: Float32
    """[B, E]: of each expert's distribution, for rules that need it."""

    gate: Float32
    """[B, E]: the gate's coefficients, for rules that need them."""

    cross_entropy: Float32
    """[B, E]: nats per prompt token under each expert, for `perplexity`."""

    def only(self, rows: Int64 | slice) -> Evidence:
        """That of some rows."""
        return Evidence(
            self.available[rows], self.confidence[rows], self.entropy[rows], self.gate[rows], self.cross_entropy[rows]
        )


def coefficients(policy: Policy, experts: list[str], evidence: Evidence) -> Float32:
    """float32[B, E]: the rule's coefficients, 0 for experts that are not available.

    Where the coefficients are shares, the available experts' are rescaled to make up for the lost ones. Where a rule
    gives positive weight only to experts that are not available, the available ones share equally. A row that lacks an
    expert essential to the rule gets 0 throughout; proxy-tuning without one of its two corrections is the base alone.
    """
    wanted = _rule(policy, experts, evidence)
    available = evidence.available
    if available.all():
        return wanted
    if isinstance(policy, Proxy):
        names = (policy.tuned, policy.untuned)
        whole = available[:, [experts.index(name) for name in names]].all(axis=1, keepdims=True)
        wanted = np.where(whole, wanted, _constant(Single(policy.base), experts))
    kept = np.where(available, wanted, np.float32(0))
    if isinstance(policy, Gate | Uniform | Weights | Perplexity):
        total, left = wanted.sum(axis=1, keepdims=True), kept.sum(axis=1, keepdims=True)
        kept = kept * np.where((total > 0) & (left > 0), total / np.where(left > 0, left, 1), 1)
    if leaders := essential(policy):
        led = available[:, [experts.index(name) for name in leaders]].all(axis=1, keepdims=True)
        return np.where(led, kept, 0).astype(np.float32)
    equal = available / np.maximum(available.sum(axis=1, keepdims=True), 1)
    weightless = (wanted > 0).any(axis=1, keepdims=True) & ~(kept > 0).any(axis=1, keepdims=True)
    return np.where(weightless, equal, kept).astype(np.float32)


def space(policy: Policy, gate_space: Space) -> Space:
    """The space in which `policy` combines."""
    match policy:
        case Gate():
            return gate_space
        case Uniform(space=chosen) | Weights(space=chosen) | Perplexity(space=chosen):
            return chosen
    return "logprob"


def plausibility(policy: Policy, experts: list[str]) -> tuple[int, float]:
    """Contrastive decoding's plausibility mask: (the expert who leads, log of the share of its largest probability that
    a token must have to it); (-1, 0) for other rules."""
    if not isinstance(policy, Contrastive):
        return -1, 0.0
    return experts.index(policy.expert), math.log(max(policy.plausibility, 1e-30))


def _rule(policy: Policy, experts: list[str], evidence: Evidence) -> Float32:
    shape = evidence.available.shape
    match policy:
        case Gate():
            return evidence.gate
        case Uniform():
            return np.full(shape, 1 / shape[1], np.float32)
        case Product():
            return np.ones(shape, np.float32)
        case Select(by=by):
            return _one_hot(_selected(by, evidence), shape[1])
        case FusionRoute(router=router):
            return _routed(experts.index(router), evidence.gate)
        case Perplexity(tau=tau):
            return _softmax(np.where(evidence.available, -evidence.cross_entropy / tau, _HOPELESS))
    return np.broadcast_to(_constant(policy, experts), shape).copy()


def _constant(policy: Policy, experts: list[str]) -> Float32:
    """float32[E] of a rule whose coefficients never change."""
    named: dict[str, float]
    match policy:
        case Weights(weights=weights):
            named = weights
        case Single(expert=expert):
            named = {expert: 1.0}
        case Contrastive(expert=expert, amateur=amateur, mu=mu):
            named = {expert: 1.0, amateur: -mu}
        case Proxy(base=base, tuned=tuned, untuned=untuned, alpha=alpha):
            named = {base: 1.0}
            named[tuned] = named.get(tuned, 0.0) + alpha
            named[untuned] = named.get(untuned, 0.0) - alpha
        case _:
            raise TypeError(f"no constant coefficients for {policy!r}")
    return np.array([named.get(name, 0.0) for name in experts], np.float32)


def _selected(by: str, evidence: Evidence) -> Int64:
    """int64[B]: the expert that a `select` policy takes."""
    if by == "gate":
        score = evidence.gate
    elif by == "entropy":
        score = -evidence.entropy
    else:
        score = evidence.confidence
    return np.asarray(np.where(evidence.available, score, -np.inf).argmax(axis=1))


def _routed(router: int, scores: Float32) -> Float32:
    """1 for the router and 1 for the expert, other than it, with the highest gate score."""
    others = scores.copy()
    others[:, router] = -np.inf
    routed = _one_hot(others.argmax(axis=1), scores.shape[1])
    routed[:, router] = 1
    return routed


def _one_hot(chosen: Int64, width: int) -> Float32:
    return np.eye(width, dtype=np.float32)[chosen]


def _softmax(scores: Float32) -> Float32:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)
