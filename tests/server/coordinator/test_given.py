"""Tokens that are given are fused like sampled ones, and what follows them is what follows the same prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from server.request import SequenceRequest
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import VOCABULARY, Behaviour, FakeEngine, FakeModel


def fused_logprobs(models: list[FakeModel], tokens: list[int]) -> list[float]:
    """Of every token but the first, the mean of the experts' log-probabilities, normalised: the uniform policy."""
    logprobs = []
    for at in range(1, len(tokens)):
        scores = sum(log_softmax(model.logits(tokens[:at]).astype(np.float64)) for model in models) / len(models)
        logprobs.append(float(scores[tokens[at]] - logsumexp(scores)))
    return logprobs


def apart(whole: SequenceRequest, number: int) -> SequenceRequest:
    """The same, with all of the prompt given but its first token."""
    prompt = whole.prompts[0]
    return replace(
        whole,
        id=number,
        prompts=[prompt[:1]] * len(whole.prompts),
        given=prompt[1:],
        max_tokens=len(prompt) - 1 + whole.max_tokens,
        min_tokens=len(prompt) - 1 + whole.min_tokens,
    )


@pytest.mark.parametrize("chunk", [1_000_000, 5])
@pytest.mark.parametrize("length", [1, 3, VOCABULARY])
def test_given_tokens_have_their_fused_logprobs(tmp_path, rng, models, chunk, length):
    """Several at once, of different lengths, one engine with too little memory for all."""
    engines = [FakeEngine(models[0], Behaviour(chunk=chunk)), FakeEngine(models[1], Behaviour(kv_tokens=96))]
    with Deployment(tmp_path, engines, list_length=length) as deployment:
        wholes = [request(rng, (length, length), top_logprobs=2, max_tokens=1) for length in (2, 9, 17, 30)]
        for whole in wholes:
            whole.prompts[1][:] = whole.prompts[0]
        scored = [apart(whole, 10_000 + whole.id) for whole in wholes]
        deployment.run(*scored)
    for each in scored:
        tokens = each.prompts[0] + each.given
        assert deployment.tokens[each.id][: len(each.given)] == each.given
        found = [detail.logprob for detail in deployment.details[each.id]][: len(each.given)]
        np.testing.assert_allclose(found, fused_logprobs(models, tokens), atol=1e-4 if length == VOCABULARY else 1.1e-3)


@pytest.mark.parametrize("length", [2, VOCABULARY])
def test_what_follows_is_what_follows_the_prompt(tmp_path, rng, models, length):
    """Seed, penalties, stop tokens (one is among the given) and min_tokens count from the end of the given tokens."""
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=length) as deployment:
        whole = request(rng, (12, 12), presence_penalty=1.5, repetition_penalty=1.3, logit_bias={3: 2.0}, min_tokens=3)
        whole.prompts[1][:] = whole.prompts[0]
        whole = replace(whole, stop_token_ids=[whole.prompts[0][5]])
        scored = apart(whole, 20_000)
        deployment.run(whole)
        deployment.run(scored)
    assert deployment.tokens[scored.id] == scored.given + deployment.tokens[whole.id]
    assert deployment.ended[scored.id].reason == deployment.ended[whole.id].reason
