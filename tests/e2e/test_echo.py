"""A prompt's own log-probabilities, fused at every position, are those of Hugging Face transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.local import LocalDeployment
from server.policy import Policy, Single, Uniform, participants
from server.request import FinishReason
from tests.e2e import demo
from tests.e2e.requests import greedy
from tests.oracle.reference import Reference

POLICIES: list[Policy] = [Uniform(), Uniform(space="prob"), Single("text")]


def fused(policy: Policy, logprobs: torch.Tensor) -> torch.Tensor:
    """float64[T, V] of the experts' `logprobs` [E, T, V]."""
    match policy:
        case Single(expert=expert):
            return logprobs[demo.EXPERTS.index(expert)]
        case Uniform(space="prob"):
            return logprobs.exp().mean(0).log()
    return logprobs.mean(0).log_softmax(-1)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_prompts_are_scored_as_by_transformers(policy: Policy, whole: LocalDeployment, reference: Reference) -> None:
    prompts = [reference.encode(messages) for messages in demo.conversations(12)]
    used = participants(policy, demo.EXPERTS)
    requests = [
        greedy(
            [prompt[:1] if index in used else [] for index in range(len(demo.EXPERTS))],
            policy,
            len(prompt) - 1,
            given=prompt[1:],
            top_logprobs=0,
            stop_token_ids=[demo.EOS],
        )
        for prompt in prompts
    ]
    results = whole.generate(requests)
    for request, prompt in zip(requests, prompts, strict=True):
        result = results[request.id]
        assert result.ended is not None and result.ended.reason is FinishReason.LENGTH
        assert result.tokens == prompt[1:]
        wanted = fused(policy, reference.logprobs(prompt)[:, :-1]).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        np.testing.assert_allclose([choice.logprob for choice in result.choices], wanted.numpy(), atol=2e-3)
