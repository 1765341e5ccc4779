"""Policies that fuse, each with its definition as a rule of the oracle; `Path`: the gate of the deployment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.policy import Gate, Policy, Product, Uniform, Weights
from tests.support import gates
from tests.support.oracle import rules
from tests.support.oracle.huggingface import Rule

WEIGHTS = {"math": 0.5, "text": 0.2, "chat": 0.3}
UNEVEN = {"math": 1.3, "text": -0.4, "chat": 0.6}

FUSED: dict[str, tuple[Policy, Callable[[Path], Rule]]] = {
    "uniform-logprob": (Uniform(), lambda _: rules.log_linear([1 / 3] * 3)),
    "uniform-prob": (Uniform(space="prob"), lambda _: rules.linear([1 / 3] * 3)),
    "weights-prob": (Weights(WEIGHTS, space="prob"), lambda _: rules.linear(list(WEIGHTS.values()))),
    "weights-signed": (Weights(UNEVEN), lambda _: rules.log_linear(list(UNEVEN.values()))),
    "product": (Product(), lambda _: rules.log_linear([1.0] * 3)),
    "gate": (Gate(), lambda gate: rules.GateRule(gate, gates.STATE)),
}
