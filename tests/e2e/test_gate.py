"""The coefficients that the server reports are those of the same TorchScript file, evaluated on transformers' hidden
states and distributions: position by position, with its recurrent state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.launch.local import Generated, LocalDeployment
from server.policy import Gate
from tests.support import demo, gates
from tests.support.oracle import rules
from tests.support.oracle.compare import first_difference
from tests.support.oracle.huggingface import Decision, Decoded, Reference, Views
from tests.support.sequences import greedy

PROMPTS = 30
TOKENS = 32
TOLERANCE = 1e-4


class Forgetful(rules.GateRule):
    """The same gate with its state cleared before every token."""

    def weigh(self, views: Views, *, forget: bool = False) -> torch.Tensor:
        return super().weigh(views, forget=True)


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> list[list[list[int]]]:
    return [[reference.encode(messages)] * 3 for messages in demo.conversations(PROMPTS)]


@pytest.fixture(scope="module")
def served(whole: LocalDeployment, prompts: list[list[list[int]]]) -> list[Generated]:
    requests = [greedy(row, Gate(), TOKENS, expert_weights=True) for row in prompts]
    results = whole.generate(requests)
    return [results[request.id] for request in requests]


def differences(served: list[Generated], decoded: Decoded) -> torch.Tensor:
    """|served - expected| coefficients float64[N, E] of all positions at which both have read the same tokens."""
    rows = []
    for row, result in enumerate(served):
        at = first_difference(result.tokens, decoded.tokens[row].tolist())
        same = len(result.tokens) if at is None else at + 1
        found = torch.tensor([each.coefficients for each in result.details[:same]], dtype=torch.float64)
        rows.append((found - decoded.coefficients[row, :same]).abs())
    return torch.cat(rows)


def test_coefficients_equal_the_file_on_transformers_hidden_states(
    served: list[Generated], whole_gate: Path, reference: Reference, prompts: list[list[list[int]]]
) -> None:
    decoded = reference.decode(prompts, rules.GateRule(whole_gate, gates.STATE), TOKENS)
    off = differences(served, decoded)
    print(f"\n{len(off)} positions: largest difference {off.max():.2g}, spread {decoded.coefficients.std(dim=(0, 1))}")
    assert len(off) > 0.9 * PROMPTS * TOKENS
    assert off.max() < TOLERANCE
    assert decoded.coefficients.std(dim=(0, 1)).max() > 0.05  # a constant would show nothing


def test_coefficients_depend_on_the_recurrent_state(
    served: list[Generated], whole_gate: Path, reference: Reference, prompts: list[list[list[int]]]
) -> None:
    """A server that lost the state between tokens would give these coefficients instead; so the test above can fail."""
    tokens = [result.tokens for result in served]
    decoded = reference.decode(prompts, _Forced(Forgetful(whole_gate, gates.STATE), tokens), TOKENS)
    assert differences(served, decoded).mean() > 100 * TOLERANCE


class _Forced:
    """A rule that takes its coefficients from `rule` and its tokens from a list: teacher forcing."""

    def __init__(self, rule: rules.GateRule, tokens: list[list[int]]) -> None:
        self._rule = rule
        self._tokens = torch.tensor(tokens)
        self._step = 0

    def __call__(self, views: Views) -> Decision:
        decision = self._rule(views)
        forced = torch.full_like(decision.logprobs, -rules.NO_LIMIT)
        decision.logprobs = forced.scatter(1, self._tokens[:, self._step, None], 0.0)
        self._step += 1
        return decision
