"""Fusion policies as data: which rule gives the experts' coefficients, and in which space they are combined.

A policy is written in the configuration file (`policies:`), chosen by a request, and sent to the coordinator as it
is. What a rule computes lives in `server.coordinator.coefficients`; this module knows only its parameters.

Spaces: `logprob` is log p = sum_i c_i log p_i - log Z (any real c_i); `prob` is p = sum_i w_i p_i (w on the simplex).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

Space = Literal["logprob", "prob"]

MAX_COEFFICIENT = 1000.0
"""Of what a policy names, either way: float32 still tells the tokens apart."""


class _Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="rule"):
    """Base: a frozen, hashable value tagged with its `rule`."""


class Gate(_Policy, frozen=True, tag="gate"):
    """Coefficients and space from the gate checkpoint, per token (DLLG, arXiv 2606.04378)."""


class Uniform(_Policy, frozen=True, tag="uniform"):
    """1/E each."""

    space: Space = "logprob"
    """Whether log-probabilities are averaged (a geometric mean), or probabilities."""


class Weights(_Policy, frozen=True, tag="weights"):
    """Constant coefficients by expert name; an expert not named has 0 and does not run."""

    weights: dict[str, float]
    """Expert name -> coefficient. Any real number in log-probability space; none negative in probability space."""
    space: Space = "logprob"
    """Whether log-probabilities are combined, or probabilities."""

    def __hash__(self) -> int:
        return hash((self.space, *sorted(self.weights.items())))


class Product(_Policy, frozen=True, tag="product"):
    """Product of experts: coefficient 1 each, in log-probability space."""


class Select(_Policy, frozen=True, tag="select"):
    """One expert per token: the gate's argmax, the lowest entropy, or the highest top-1 probability."""

    by: Literal["gate", "entropy", "confidence"] = "confidence"
    """What picks the expert: the gate's largest coefficient, the lowest entropy, or the largest top-1 probability."""


class Single(_Policy, frozen=True, tag="single"):
    """One expert alone; this is how each expert is served by its own name."""

    expert: str
    """Its name."""


class Contrastive(_Policy, frozen=True, tag="contrastive"):
    """log p = log p_expert - mu log p_amateur where p_expert >= plausibility * max p_expert (arXiv 2210.15097)."""

    expert: str
    """The name of the expert that is believed."""
    amateur: str
    """The name of the weaker one, whose habits are subtracted."""
    mu: float = 0.5
    """How much of the amateur is subtracted."""
    plausibility: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    """Tokens less probable to the expert than this share of its most probable one cannot be chosen."""


class Proxy(_Policy, frozen=True, tag="proxy"):
    """Proxy-tuning: log p = log p_base + alpha (log p_tuned - log p_untuned) (arXiv 2401.08565)."""

    base: str
    """The name of the model that is steered."""
    tuned: str
    """The name of a tuned model: what it says more of is added."""
    untuned: str
    """The name of the same model before its tuning: what it says is subtracted."""
    alpha: float = 1.0
    """How strongly the difference steers."""


class FusionRoute(_Policy, frozen=True, tag="fusionroute"):
    """Router engine 1, the expert the gate prefers 1, others 0 (arXiv 2601.05106)."""

    router: str
    """The name of the expert that is the router model."""


class Perplexity(_Policy, frozen=True, tag="perplexity"):
    """w = softmax(-prompt cross-entropy / tau), fixed for the request (PackLLM, arXiv 2404.11531)."""

    tau: Annotated[float, msgspec.Meta(ge=1e-6)] = 1.0
    """Temperature of the softmax: the smaller, the more the expert that knows the prompt best is followed."""
    space: Space = "logprob"
    """Whether log-probabilities are combined, or probabilities."""


Policy = Gate | Uniform | Weights | Product | Select | Single | Contrastive | Proxy | FusionRoute | Perplexity


def expert_names(policy: Policy) -> list[str]:
    """The expert names a policy mentions, in the order of its fields."""
    match policy:
        case Weights(weights=weights):
            return list(weights)
        case Single(expert=expert):
            return [expert]
        case Contrastive(expert=expert, amateur=amateur):
            return [expert, amateur]
        case Proxy(base=base, tuned=tuned, untuned=untuned):
            return [base, tuned, untuned]
        case FusionRoute(router=router):
            return [router]
    return []


def range_problem(policy: Policy) -> str | None:
    """Why the coefficients that `policy` names cannot be computed with, or None."""
    named: list[float] = []
    match policy:
        case Weights(weights=weights):
            named = list(weights.values())
        case Contrastive(mu=number) | Proxy(alpha=number):
            named = [number]
    if all(abs(number) <= MAX_COEFFICIENT for number in named):
        return None
    return f"coefficients must be from {-MAX_COEFFICIENT:g} to {MAX_COEFFICIENT:g}"


def participants(policy: Policy, experts: Sequence[str]) -> list[int]:
    """Indexes, ascending, of the experts whose engines must run for `policy`."""
    match policy:
        case Weights(weights=weights):
            names = {name for name, weight in weights.items() if weight != 0.0}
        case Single() | Contrastive() | Proxy():
            names = set(expert_names(policy))
        case _:
            names = set(experts)
    return [index for index, name in enumerate(experts) if name in names]


def essential(policy: Policy) -> list[str]:
    """The experts without whom `policy` means nothing: the others only correct or complement what they say."""
    match policy:
        case Single(expert=expert) | Contrastive(expert=expert):
            return [expert]
        case Proxy(base=base):
            return [base]
        case FusionRoute(router=router):
            return [router]
    return []


def needs_gate(policy: Policy) -> bool:
    """Whether `policy` asks the gate checkpoint."""
    return isinstance(policy, Gate | FusionRoute) or (isinstance(policy, Select) and policy.by == "gate")


def needs_entropy(policy: Policy) -> bool:
    """Whether `policy` asks for the entropy of each expert's distribution."""
    return isinstance(policy, Select) and policy.by == "entropy"
