"""Whether a deployment of SmolLM2 serves the tokens that transformers fuses, for every policy.

Three experts: the base model as a poet and as a teacher, and the adapter `style`. The server decodes greedily; then
transformers reads what it served, in float32, and says which token it would have chosen at each position, over the
whole vocabulary. Two implementations round differently, so positions where the reference's own choice is closer than
`NOISE` are counted apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.launch.local import LocalDeployment
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
    Uniform,
    Weights,
)
from tests.bench.exactness.recording import POET, QUESTIONS, TEACHER
from tests.support import gates
from tests.support.oracle import rules
from tests.support.oracle.huggingface import Decision, Reference, Rule, Views
from tests.support.sequences import greedy

VARIABLE = "POLYLOGIT_SMOLLM2"
"""Environment variable: the folder that deploy.smollm2.fetch and deploy.smollm2.adapters filled."""

EXPERTS = ["poet", "teacher", "style"]
SYSTEM = {"poet": POET, "teacher": TEACHER}
FACTS = (
    "What is the capital of France?",
    "How many legs does a spider have?",
    "What is 345 + 678?",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "What is the opposite of cold?",
    "Name three fruits.",
    "Translate good morning into Spanish.",
    "Is a whale a fish?",
    "What comes after Tuesday?",
    "How far away is the moon?",
    "What do bees make?",
    "Spell the word necessary.",
    "What is the boiling point of water?",
)
PROMPTS = (*QUESTIONS, *FACTS)
TOKENS = 48
NOISE = 1e-3
"""Nats of fused log-probability."""
GATE_READS = 32
TAU = 0.5

WEIGHTS = {"poet": 0.5, "teacher": 0.2, "style": 0.3}
UNEVEN = {"poet": 1.3, "teacher": -0.4, "style": 0.6}
STATE = gates.STATE

CASES: dict[str, tuple[Policy, Callable[[Path], Rule] | None]] = {
    "uniform": (Uniform(), lambda _: rules.log_linear([1 / 3] * 3)),
    "uniform, prob": (Uniform(space="prob"), lambda _: rules.linear([1 / 3] * 3)),
    "weights": (Weights(WEIGHTS), lambda _: rules.log_linear(list(WEIGHTS.values()))),
    "weights, prob": (Weights(WEIGHTS, space="prob"), lambda _: rules.linear(list(WEIGHTS.values()))),
    "weights, one negative": (Weights(UNEVEN), lambda _: rules.log_linear(list(UNEVEN.values()))),
    "product": (Product(), lambda _: rules.log_linear([1.0] * 3)),
    "select, entropy": (Select(by="entropy"), lambda _: rules.select("entropy")),
    "select, confidence": (Select(by="confidence"), lambda _: rules.select("confidence")),
    "select, gate": (Select(by="gate"), lambda gate: rules.GateSelect(gate, STATE, listed=GATE_READS)),
    "single": (Single("style"), lambda _: rules.log_linear([0.0, 0.0, 1.0])),
    "contrastive": (Contrastive("style", "poet"), lambda _: rules.contrastive(2, 0, 0.5, 0.1)),
    "proxy": (Proxy("poet", "style", "teacher"), lambda _: rules.log_linear([1.0, -1.0, 1.0])),
    "gate": (Gate(), lambda gate: rules.GateRule(gate, STATE, listed=GATE_READS)),
    "fusionroute": (FusionRoute("poet"), lambda gate: rules.GateSelect(gate, STATE, router=0, listed=GATE_READS)),
    "perplexity": (Perplexity(tau=TAU), None),  # its coefficients differ from prompt to prompt
}


@dataclass
class Agreement:
    """Of one policy, over all prompts."""

    policy: str
    positions: int = 0
    equal: int = 0
    """Positions at which the served token is the reference's."""
    near: int = 0
    """Positions, of all, at which the reference's choice is closer than `NOISE`."""
    near_different: int = 0
    """Those of them at which another token was served."""
    wrong: list[str] = field(default_factory=list)
    """Other differences."""


def folder() -> Path | None:
    """Where the models are, if the environment says so."""
    named = os.environ.get(VARIABLE)
    return Path(named).absolute() if named else None


def models(place: Path) -> list[Path]:
    return [place / "base", place / "base", place / "style"]


def configuration(place: Path, gate: Path) -> dict[str, Any]:
    """Of a deployment of the three."""
    keys = {"dtype": "float32", "kv_cache_memory": "512MiB", "max_model_len": 512}
    return {
        "name": "smollm2",
        "experts": [
            {"name": name, "model": str(model), **keys} for name, model in zip(EXPERTS, models(place), strict=True)
        ],
        "gate": {"file": str(gate)},
        "limits": {"sequences": len(PROMPTS), "queue": 4 * len(PROMPTS)},
    }


def build_gate(place: Path, path: Path) -> Path:
    """A gate with random weights for the three."""
    return gates.build(
        path,
        experts=EXPERTS,
        tokenizer=place / "base" / "tokenizer.json",
        top_k=GATE_READS,
        hidden=576,
        vocabulary=49152,
    )


def prompts(reference: Reference) -> list[list[list[int]]]:
    """For each question each expert's prompt."""
    rows = []
    for question in PROMPTS:
        asked = [{"role": "user", "content": question}]
        systems = [[{"role": "system", "content": SYSTEM[name]}] if name in SYSTEM else [] for name in EXPERTS]
        rows.append([reference.encode([*system, *asked]) for system in systems])
    return rows


def serve(name: str, deployment: LocalDeployment, asked: list[list[list[int]]]) -> list[list[int]]:
    """The tokens that answer each prompt under one policy."""
    requests = [greedy(row, CASES[name][0], TOKENS) for row in asked]
    results = deployment.generate(requests, timeout=600.0)
    return [results[request.id].tokens for request in requests]


@torch.inference_mode()
def judge(
    name: str, served: list[list[int]], gate: Path, reference: Reference, asked: list[list[list[int]]]
) -> Agreement:
    """Have the reference read what was `served` under one policy."""
    make_rule, agreement = CASES[name][1], Agreement(name)
    for number, (row, tokens) in enumerate(zip(asked, served, strict=True)):
        rule = _by_perplexity(reference, row) if make_rule is None else make_rule(gate)
        _add(agreement, number, tokens, _decide(rule, reference.along(row, tokens)))
    return agreement


def _add(agreement: Agreement, number: int, served: list[int], decision: Decision) -> None:
    best = decision.logprobs.topk(2, -1)
    near = (best.values[:, 0] - best.values[:, 1] < NOISE) | (decision.slack < NOISE)  # [T]
    equal = best.indices[:, 0] == torch.tensor(served)  # [T]
    agreement.positions += len(served)
    agreement.equal += int(equal.sum())
    agreement.near += int(near.sum())
    agreement.near_different += int((near & ~equal).sum())
    for at in torch.nonzero(~near & ~equal)[:, 0].tolist():
        wanted = int(best.indices[at, 0])
        ahead = float(decision.logprobs[at, wanted] - decision.logprobs[at, served[at]])
        agreement.wrong.append(
            f"prompt {number}, position {at}: {served[at]}, not {wanted} (ahead by {ahead:.2g} nats)"
        )


def _decide(rule: Rule, views: Views) -> Decision:
    """One position after another where the rule has a state, which is one conversation's."""
    if not isinstance(rule, rules.GateRule):
        return rule(views)
    steps = [
        rule(Views(views.logprobs[at : at + 1], [hidden[at : at + 1] for hidden in views.hidden]))
        for at in range(len(views.logprobs))
    ]
    return Decision(
        torch.cat([step.logprobs for step in steps]),
        torch.cat([step.coefficients for step in steps]),
        torch.cat([step.slack for step in steps]),
    )


def _by_perplexity(reference: Reference, row: list[list[int]]) -> Rule:
    entropies = [reference.cross_entropy(prompt, expert) for expert, prompt in enumerate(row)]
    return rules.PerRow((-torch.tensor(entropies, dtype=torch.float64) / TAU).softmax(-1)[None])
