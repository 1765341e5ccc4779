"""One sequence generated alone, by full-history fusion in plain Python and NumPy, float64, over the whole vocabulary.

Written from the definitions; shares nothing with the coordinator but the request. What a greedy sequence must come to,
however it was batched, parked, preempted or restarted, and however short the experts' lists are. A sampled one must
come to the same only where the lists hold the whole vocabulary: else its random numbers mean other tokens, by the same
law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from server.request import FinishReason, SamplingParams, SequenceRequest
from server.wire.api import TokenDetails
from tests.support.coordinator.harness import Deployment
from tests.support.fake_engine import FakeModel

MASK = 2**64 - 1

Weigh = Callable[[dict[int, np.ndarray], int], dict[int, float]]
"""(expert -> log-probabilities [V] of the experts that are there, step) -> expert -> coefficient."""

Gone = Callable[[int, int], bool]
"""(expert, step) -> it has nothing to say there."""


def uniform(seed: int, position: int) -> float:
    """SplitMix64 (Steele, Lea, Flood 2014) in Python's integers: number `position` of stream `seed`, in [0, 1)."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    return (mix((mix(seed) + position * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def truncate(scores: dict[int, float], temperature=1.0, top_p=1.0, top_k=0, min_p=0.0) -> dict[int, float]:
    """The distribution to sample from: token -> probability, truncated in vLLM's order."""
    best = max(scores.values())
    p = {token: math.exp((score - best) / temperature) for token, score in scores.items()}
    p = {token: value for token, value in p.items() if value >= min_p}  # the highest is 1
    order = sorted(p, key=lambda token: (-p[token], token))
    if top_k:
        order = order[:top_k]
    total, before, kept = sum(p[token] for token in order), 0.0, []
    for token in order:
        if before < top_p * total:
            kept.append(token)
        before += p[token]
    total = sum(p[token] for token in kept)
    return {token: p[token] / total for token in kept}


def sample(scores: dict[int, float], sampling: SamplingParams, position: int) -> int:
    """The token, going through the candidates in the order of their ids."""
    if sampling.temperature == 0:
        return min(scores, key=lambda token: (-scores[token], token))
    shares = truncate(scores, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
    number, reached = uniform(sampling.seed, position), 0.0
    for token in sorted(shares):
        reached += shares[token]
        if reached > number:
            return token
    return max(shares)


@dataclass
class Alone:
    """`logprobs[t]`: of token t in the fused distribution, before bias and penalties."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH


def shares(weights: Sequence[float]) -> Weigh:
    """Constant shares; those of experts that are not there go to the others in proportion."""

    def weigh(logprobs: dict[int, np.ndarray], step: int) -> dict[int, float]:
        left = sum(weights[expert] for expert in logprobs)
        return {expert: weights[expert] * sum(weights) / left for expert in logprobs}

    return weigh


def generate(
    request: SequenceRequest,
    models: Sequence[FakeModel],
    weigh: Weigh,
    *,
    prob_space: bool = False,
    gone: Gone = lambda expert, step: False,
    max_tokens: int | None = None,
) -> Alone:
    """What `request` comes to."""
    alone = Alone()
    sampling = request.sampling
    for step in range(min(request.max_tokens, max_tokens or request.max_tokens)):
        fused = _fused(request, models, weigh, alone.tokens, prob_space, gone)
        token = sample(_adjust(request, fused, alone.tokens), sampling, step)
        alone.tokens.append(token)
        alone.logprobs.append(float(fused[token]))
        if token in request.stop_token_ids:
            alone.reason = FinishReason.STOP
            break
    return alone


def along(
    request: SequenceRequest,
    models: Sequence[FakeModel],
    weigh: Weigh,
    tokens: Sequence[int],
    *,
    prob_space: bool = False,
    gone: Gone = lambda expert, step: False,
) -> list[np.ndarray]:
    """The fused distribution at each of `tokens`, however they were sampled: log-probabilities float64[V], before bias
    and penalties."""
    return [_fused(request, models, weigh, list(tokens[:step]), prob_space, gone) for step in range(len(tokens))]


def expert_logprobs(request: SequenceRequest, model: FakeModel, expert: int, generated: list[int]) -> np.ndarray:
    """float64[V] of one expert after its prompt and `generated`."""
    heat = request.temperatures[expert] if request.temperatures else 1.0
    return log_softmax(model.logits(request.prompts[expert] + generated).astype(np.float64) / heat)


def cross_entropy(model: FakeModel, prompt: list[int]) -> float:
    """Mean nats for each token of `prompt` but the first."""
    terms = [-log_softmax(model.logits(prompt[:at]).astype(np.float64))[prompt[at]] for at in range(1, len(prompt))]
    return float(np.mean(terms)) if terms else 0.0


def _fused(
    request: SequenceRequest,
    models: Sequence[FakeModel],
    weigh: Weigh,
    generated: list[int],
    prob_space: bool,
    gone: Gone,
) -> np.ndarray:
    """float64[V] of the token after `generated`."""
    step = len(generated)
    said = {
        expert: expert_logprobs(request, models[expert], expert, generated)
        for expert in range(len(models))
        if request.prompts[expert] and not gone(expert, step)
    }
    coefficients = weigh(said, step)
    if prob_space:
        scores = np.log(sum(c * np.exp(said[expert]) for expert, c in coefficients.items()))
    else:
        scores = sum(c * said[expert] for expert, c in coefficients.items())
    return scores - logsumexp(scores)


def _adjust(request: SequenceRequest, fused: np.ndarray, generated: list[int]) -> dict[int, float]:
    """After logit_bias, min_tokens and the penalties."""
    sampling = request.sampling
    prompted = set().union(*request.prompts)
    scores = {}
    for token, logprob in enumerate(fused.tolist()):
        score = logprob + sampling.logit_bias.get(token, 0.0)
        if len(generated) < request.min_tokens and token in request.stop_token_ids:
            continue
        count = generated.count(token)
        if count or token in prompted:
            score *= sampling.repetition_penalty ** (-1 if score > 0 else 1)
        scores[token] = score - count * sampling.frequency_penalty - (count > 0) * sampling.presence_penalty
    return scores


HALF = shares([0.5, 0.5])
"""Two experts with equal weights."""


def assert_details(details: Sequence[TokenDetails], tokens: Sequence[int], laws: list[np.ndarray], error=1e-4) -> None:
    """Each token's log-probability, rank and alternatives are those of `laws`, within `error`."""
    for detail, token, law in zip(details, tokens, laws, strict=True):
        assert detail.logprob == pytest.approx(law[token], abs=error)
        assert detail.rank == 1 + (law > law[token]).sum()
        best = np.argsort(-law, kind="stable")[: len(detail.top)]
        assert [other for other, _ in detail.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in detail.top], law[best], atol=error)


def assert_alone(deployment: Deployment, requests: Sequence[SequenceRequest], expected: Sequence[Alone]) -> None:
    """Each sequence of the deployment came to what it comes to alone."""
    for each, alone in zip(requests, expected, strict=True):
        assert deployment.tokens[each.id] == alone.tokens
        assert deployment.ended[each.id].reason == alone.reason
