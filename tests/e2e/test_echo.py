"""A prompt's own log-probabilities, fused at every position, are those of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from server.launch.local import Generated, LocalDeployment
from server.policy import Gate, Policy, Single, Uniform, participants
from server.request import FinishReason, SequenceRequest
from tests.support import demo, gates
from tests.support.oracle import rules
from tests.support.oracle.huggingface import Decision, Reference, Rule, Views
from tests.support.sequences import greedy

PROMPTS = 12
TOLERANCE = 2e-3  # nats
TEXT = demo.EXPERTS.index("text")

CASES: dict[str, tuple[Policy, Callable[[Path], Rule]]] = {
    "uniform-logprob": (Uniform(), lambda _: rules.log_linear([1 / 3] * 3)),
    "uniform-prob": (Uniform(space="prob"), lambda _: rules.linear([1 / 3] * 3)),
    "single": (Single("text"), lambda _: rules.log_linear([float(index == TEXT) for index in range(3)])),
    "gate": (Gate(), lambda gate: rules.GateRule(gate, gates.STATE)),
}


class Reading:
    """Teacher forcing: `said` [T, V] is what `rule` says at each place of one text, whatever it would have chosen."""

    def __init__(self, rule: Rule, tokens: list[int]) -> None:
        self._rule = rule
        self._tokens = tokens
        self.said: list[torch.Tensor] = []

    def __call__(self, views: Views) -> Decision:
        decision = self._rule(views)
        token = self._tokens[len(self.said)]
        self.said.append(decision.logprobs[0])
        forced = torch.full_like(decision.logprobs, -rules.NO_LIMIT)
        forced[0, token] = 0.0
        return Decision(forced, decision.coefficients, decision.slack)


def said_of(prompt: list[int], rule: Rule, reference: Reference) -> torch.Tensor:
    """Fused log-probabilities float64[T, V] of what follows each token of `prompt` but the last."""
    reading = Reading(rule, prompt[1:])
    reference.decode([[prompt[:1]] * 3], reading, len(prompt) - 1)
    return torch.stack(reading.said)


def scored(prompt: list[int], policy: Policy, more: int = 0) -> SequenceRequest:
    """`prompt` with every token given but the first, and `more` tokens to sample."""
    used = participants(policy, demo.EXPERTS)
    return greedy(
        [prompt[:1] if index in used else [] for index in range(len(demo.EXPERTS))],
        policy,
        len(prompt) - 1 + more,
        given=prompt[1:],
        top_logprobs=0,
        stop_token_ids=[demo.EOS],
    )


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_scored_as_by_transformers(
    case: str, whole: LocalDeployment, whole_gate: Path, reference: Reference
) -> None:
    policy, make_rule = CASES[case]
    prompts = [reference.encode(messages) for messages in demo.conversations(PROMPTS)]
    requests = [scored(prompt, policy) for prompt in prompts]
    results = whole.generate(requests)
    for request, prompt in zip(requests, prompts, strict=True):
        result = results[request.id]
        assert result.ended is not None and result.ended.reason is FinishReason.LENGTH
        assert result.tokens == prompt[1:]
        check_scores(result, said_of(prompt, make_rule(whole_gate), reference))


def check_scores(result: Generated, said: torch.Tensor) -> None:
    """Log-probabilities and ranks against the oracle's `said` [T, V]."""
    wanted = said.gather(1, torch.tensor(result.tokens)[:, None])
    np.testing.assert_allclose([each.logprob for each in result.details], wanted[:, 0], atol=TOLERANCE)
    ranks = torch.tensor([each.rank for each in result.details])
    assert (ranks >= 1 + (said > wanted + TOLERANCE).sum(1)).all()
    assert (ranks <= (said >= wanted - TOLERANCE).sum(1)).all()
    assert len(set(ranks.tolist())) > 3


def test_what_follows_a_scored_prompt_is_what_follows_the_prompt(whole: LocalDeployment, reference: Reference) -> None:
    """Under a gate with a recurrent state: it remembers the answer, not the prompt."""
    for messages in demo.conversations(3):
        prompt = reference.encode(messages)
        plain = greedy([prompt] * 3, Gate(), 16, top_logprobs=0)
        given = scored(prompt, Gate(), more=16)
        results = whole.generate([plain, given])
        sampled = results[given.id].details[len(prompt) - 1 :]
        assert results[given.id].tokens[len(prompt) - 1 :] == results[plain.id].tokens[: len(sampled)]
        for one, other in zip(results[plain.id].details, sampled, strict=False):
            np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-3)
