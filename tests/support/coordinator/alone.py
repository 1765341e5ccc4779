"""One sequence generated alone, by full-history fusion in plain Python and NumPy, float64, over the whole vocabulary.

Written from the definitions; shares nothing with the coordinator but the request. What a sequence must come to, however
it was batched, parked, preempted or restarted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax, logsumexp

from server.request import FinishReason, SamplingParams, SequenceRequest
from tests.support.coordinator.harness import Deployment
from tests.support.fake_engine import FakeModel

MASK = 2**64 - 1

Weigh = Callable[[dict[int, np.ndarray], int], dict[int, float]]
"""(expert -> log-probabilities [V] of the experts that are there, step) -> expert -> coefficient."""


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
    top_k: int | None = None,
    gone: Callable[[int, int], bool] = lambda expert, step: False,
    max_tokens: int | None = None,
) -> Alone:
    """What `request` comes to. `top_k`: only the union of the experts' best and of the ids named in the request can be
    chosen; `gone(expert, step)`: the expert has nothing to say there."""
    alone = Alone()
    sampling = request.sampling
    for step in range(min(request.max_tokens, max_tokens or request.max_tokens)):
        said = {
            expert: expert_logprobs(request, models[expert], expert, alone.tokens)
            for expert in range(len(models))
            if request.prompts[expert] and not gone(expert, step)
        }
        fused = _fuse(said, weigh(said, step), prob_space, _candidates(request, said, top_k))
        scores = _adjust(request, fused, alone.tokens)
        token = sample(scores, sampling, step)
        alone.tokens.append(token)
        alone.logprobs.append(fused[token])
        if token in request.stop_token_ids:
            alone.reason = FinishReason.STOP
            break
    return alone


def expert_logprobs(request: SequenceRequest, model: FakeModel, expert: int, generated: list[int]) -> np.ndarray:
    """float64[V] of one expert after its prompt and `generated`."""
    heat = request.temperatures[expert] if request.temperatures else 1.0
    return log_softmax(model.logits(request.prompts[expert] + generated).astype(np.float64) / heat)


def cross_entropy(model: FakeModel, prompt: list[int]) -> float:
    """Mean nats for each token of `prompt` but the first."""
    terms = [-log_softmax(model.logits(prompt[:at]).astype(np.float64))[prompt[at]] for at in range(1, len(prompt))]
    return float(np.mean(terms)) if terms else 0.0


def _candidates(request: SequenceRequest, said: dict[int, np.ndarray], top_k: int | None) -> list[int]:
    if top_k is None:
        return list(range(len(next(iter(said.values())))))
    named = {*request.stop_token_ids, *request.sampling.logit_bias}
    return sorted(named.union(*(np.argsort(-logprobs)[:top_k].tolist() for logprobs in said.values())))


def _fuse(
    said: dict[int, np.ndarray], coefficients: dict[int, float], prob_space: bool, candidates: list[int]
) -> dict[int, float]:
    if prob_space:
        scores = np.log(sum(c * np.exp(said[expert]) for expert, c in coefficients.items()))
    else:
        scores = sum(c * said[expert] for expert, c in coefficients.items())
    scores = scores[candidates]
    return dict(zip(candidates, (scores - logsumexp(scores)).tolist(), strict=True))


def _adjust(request: SequenceRequest, fused: dict[int, float], generated: list[int]) -> dict[int, float]:
    """After logit_bias, min_tokens and the penalties."""
    sampling = request.sampling
    prompted = set().union(*request.prompts)
    scores = {}
    for token, logprob in fused.items():
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


def assert_alone(deployment: Deployment, requests: Sequence[SequenceRequest], expected: Sequence[Alone]) -> None:
    """Each sequence of the deployment came to what it comes to alone."""
    for each, alone in zip(requests, expected, strict=True):
        assert deployment.tokens[each.id] == alone.tokens
        assert deployment.ended[each.id].reason == alone.reason
