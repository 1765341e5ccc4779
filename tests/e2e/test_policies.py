"""Every policy of `server.policy`, from end to end against its definition on transformers' full distributions."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server import policy as policies
from server.launch.local import LocalDeployment
from server.policy import Contrastive, FusionRoute, Perplexity, Policy, Proxy, Select, Single
from tests.support import demo, gates
from tests.support.oracle import rules
from tests.support.oracle.cases import FUSED
from tests.support.oracle.compare import TIE, compare, first_difference
from tests.support.oracle.huggingface import Reference, Rule
from tests.support.sequences import greedy

PROMPTS = 24
TOKENS = 24
MAX_TIES = 3
COEFFICIENTS = 1e-4
MATH, TEXT, CHAT = range(3)

CASES: dict[str, tuple[Policy, Callable[[Path], Rule]]] = {
    "single-math": (Single("math"), lambda _: rules.log_linear([1.0, 0.0, 0.0])),
    "single-text": (Single("text"), lambda _: rules.log_linear([0.0, 1.0, 0.0])),
    "single-chat": (Single("chat"), lambda _: rules.log_linear([0.0, 0.0, 1.0])),
    "contrastive": (
        Contrastive("math", "chat", mu=0.6, plausibility=0.05),
        lambda _: rules.contrastive(MATH, CHAT, 0.6, 0.05),
    ),
    "proxy": (Proxy("chat", "math", "text", alpha=0.7), lambda _: rules.log_linear([0.7, -0.7, 1.0])),
    "select-entropy": (Select(by="entropy"), lambda _: rules.select("entropy")),
    "select-confidence": (Select(by="confidence"), lambda _: rules.select("confidence")),
    "select-gate": (Select(by="gate"), lambda gate: rules.GateSelect(gate, gates.STATE)),
    "fusionroute": (FusionRoute("chat"), lambda gate: rules.GateSelect(gate, gates.STATE, router=CHAT)),
}


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> list[list[list[int]]]:
    return [[reference.encode(messages)] * 3 for messages in demo.conversations(PROMPTS)]


@pytest.mark.parametrize("case", CASES)
def test_policy_follows_its_definition(
    case: str, whole: LocalDeployment, whole_gate: Path, reference: Reference, prompts: list[list[list[int]]]
) -> None:
    policy, make_rule = CASES[case]
    requests = [greedy(row, policy, TOKENS, expert_weights=True) for row in prompts]
    results = whole.generate(requests)
    served = [results[request.id] for request in requests]
    decoded = reference.decode(prompts, make_rule(whole_gate), TOKENS)
    result = compare([generated.tokens for generated in served], decoded)
    print(f"\n{case}: {result.equal} of {PROMPTS * TOKENS} positions equal, ties {result.ties}")
    assert not result.wrong
    assert len(result.ties) <= MAX_TIES
    for row, generated in enumerate(served):
        at = first_difference(generated.tokens, decoded.tokens[row].tolist())
        found = torch.tensor([each.coefficients for each in generated.details[:at]], dtype=torch.float64)
        off = (found - decoded.coefficients[row, :at]).abs().max(-1).values
        decided = decoded.slack[row, :at] >= TIE  # two experts may be equally sure
        assert (off[decided] < COEFFICIENTS).all(), (row, at)


def test_perplexity_weighs_by_the_cross_entropy_of_the_prompt(
    whole: LocalDeployment, reference: Reference, prompts: list[list[list[int]]]
) -> None:
    tau = 0.5
    requests = [greedy(row, Perplexity(tau=tau), TOKENS, expert_weights=True) for row in prompts]
    results = whole.generate(requests)
    served = [results[request.id] for request in requests]
    entropies = torch.tensor([[reference.cross_entropy(row[e], e) for e in range(3)] for row in prompts])
    expected = (-entropies.double() / tau).softmax(-1)
    for row, generated in enumerate(served):
        found = torch.tensor([each.coefficients for each in generated.details], dtype=torch.float64)
        assert torch.allclose(found, expected[row].expand_as(found), atol=COEFFICIENTS), row
    result = compare(
        [generated.tokens for generated in served], reference.decode(prompts, rules.PerRow(expected), TOKENS)
    )
    assert not result.wrong
    assert len(result.ties) <= MAX_TIES
    assert expected.std(0).max() > 0.05  # prompts of different domains get different weights


def test_temperatures_of_single_experts(
    whole: LocalDeployment, reference: Reference, prompts: list[list[list[int]]]
) -> None:
    temperatures = [0.6, 1.7, 1.0]
    requests = [greedy(row, policies.Uniform(space="prob"), TOKENS, temperatures=temperatures) for row in prompts]
    results = whole.generate(requests)
    rule = rules.heated(rules.linear([1 / 3] * 3), temperatures)
    result = compare([results[request.id].tokens for request in requests], reference.decode(prompts, rule, TOKENS))
    assert not result.wrong
    assert len(result.ties) <= MAX_TIES


def test_every_policy_is_compared_somewhere() -> None:
    compared = {type(policy) for policy, _ in (*CASES.values(), *FUSED.values())} | {Perplexity}
    assert compared == set(typing.get_args(policies.Policy))
