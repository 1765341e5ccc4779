"""The policies that are measured, each with its definition as a rule of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.policy import Contrastive, Policy, Product, Proxy, Select, Single, Space, Uniform, Weights
from tests.support.oracle import rules
from tests.support.oracle.huggingface import Rule

GATES = 8
GATE_SEED = 5
GATE_SPREAD = 1.5
MU, PLAUSIBILITY = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy of a request, and what it means."""

    policy: Policy
    """As the request has it."""
    rule: Rule
    """The oracle's definition of it."""
    space: Space = "logprob"
    """In which it fuses."""


Case = Callable[[int], Variant]
"""Number of a position -> the variant used there."""


def cases(experts: list[str]) -> dict[str, Case]:
    """Name -> case, for two or three experts."""
    count = len(experts)
    shares = [0.5, 0.2, 0.3][:count] if count > 2 else [0.7, 0.3]
    mixed = Variant(Uniform(space="prob"), rules.linear([1 / count] * count), "prob")
    return {
        "uniform": _always(Variant(Uniform(), rules.log_linear([1 / count] * count))),
        "uniform, prob": _always(mixed),
        "weights": _always(_weighted(experts, shares)),
        "product": _always(Variant(Product(), rules.log_linear([1.0] * count))),
        "select, entropy": _always(Variant(Select(by="entropy"), rules.select("entropy"))),
        "single": _always(Variant(Single(experts[0]), rules.log_linear(_one_hot(count, 0)))),
        "contrastive": _always(_contrastive(experts)),
        "proxy": _always(_proxy(experts)),
        "random gate": _random_gates(experts),
    }


def _always(variant: Variant) -> Case:
    return lambda position: variant


def _weighted(experts: list[str], shares: list[float]) -> Variant:
    return Variant(Weights(dict(zip(experts, shares, strict=True))), rules.log_linear(shares))


def _one_hot(count: int, index: int) -> list[float]:
    return [float(expert == index) for expert in range(count)]


def _contrastive(experts: list[str]) -> Variant:
    """The last expert less the first."""
    policy = Contrastive(experts[-1], experts[0], mu=MU, plausibility=PLAUSIBILITY)
    return Variant(policy, rules.contrastive(len(experts) - 1, 0, MU, PLAUSIBILITY))


def _proxy(experts: list[str]) -> Variant:
    """The first steered by what the last says more than the second; of two, the first pushed beyond the second."""
    if len(experts) == 2:
        first, second = experts
        return Variant(Proxy(first, second, first, alpha=1.5), rules.log_linear([-0.5, 1.5]))
    base, untuned, tuned = experts
    return Variant(Proxy(base, tuned, untuned), rules.log_linear([1.0, -1.0, 1.0]))


def _random_gates(experts: list[str]) -> Case:
    """Coefficients as a gate gives them, a softmax, another one at each of `GATES` positions in turn."""
    scores = GATE_SPREAD * np.random.default_rng(GATE_SEED).normal(size=(GATES, len(experts)))
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    variants = [_weighted(experts, row.tolist()) for row in shares]
    return lambda position: variants[position % GATES]
