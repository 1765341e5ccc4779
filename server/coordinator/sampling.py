"""Draws one token a row from the fused distribution: bias, penalties, temperature, min_p, top_k, top_p, in vLLM's order.

Batched over rows. The random number of a row depends on its seed and position alone (a counter-based generator), so a
sequence gives the same text alone, in a batch, and after a restart.

Letters: B rows, U candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.coordinator.fusion import Bool, Float32, Int32, Int64, normalise

Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Rules:
    """Sampling parameters of B rows, as in `server.request.SamplingParams`, each an array [B]."""

    temperature: Float32
    top_p: Float32
    top_k: Int32
    min_p: Float32


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of those rows that have any: [B] parameters, and for each candidate its occurrences.

    `output_counts` int32[B, U]: in the generated tokens; `seen` bool[B, U]: in the prompt or the generated tokens.
    """

    presence: Float32
    frequency: Float32
    repetition: Float32
    output_counts: Int32
    seen: Bool


def penalise(logprobs: Float32, penalties: Penalties) -> Float32:
    """OpenAI's presence and frequency penalties and the repetition penalty (arXiv 1909.05858) on scores [B, U].

    The repetition penalty divides positive logits and multiplies negative ones. Log-probabilities are logits that
    are never positive, so here it always multiplies.
    """
    repetition = np.where(penalties.seen, penalties.repetition[:, None], np.float32(1))
    counts = penalties.output_counts
    with np.errstate(invalid="ignore"):
        scores = np.where(np.isfinite(logprobs), logprobs * repetition, logprobs)
    return np.asarray(
        scores - penalties.frequency[:, None] * counts - penalties.presence[:, None] * (counts > 0), np.float32
    )


def choose(scores: Float32, rules: Rules, uniforms: Float64) -> Int64:
    """Column int64[B] of the token drawn in each row of `scores` [B, U] (log-probabilities, -inf: impossible).

    `uniforms` float64[B] in [0, 1). Temperature 0 takes the first maximum.
    """
    best = scores.argmax(axis=1)
    drawn = rules.temperature > 0
    if not drawn.any():
        return best
    temperature = np.where(drawn, rules.temperature, np.float32(1))
    probabilities = np.exp(normalise(scores / temperature[:, None]).astype(np.float64))
    probabilities = _truncate(probabilities, rules)
    cumulative = probabilities.cumsum(axis=1)
    points = uniforms * cumulative[:, -1]
    picked = np.minimum((cumulative <= points[:, None]).sum(axis=1), scores.shape[1] - 1)
    return np.where(drawn, picked, best)


def _truncate(probabilities: Float64, rules: Rules) -> Float64:
    """Zero what min_p, top_k and top_p leave out, in this order; rows [B, U] need not sum to 1 afterwards."""
    if (rules.min_p > 0).any():
        floor = rules.min_p * probabilities.max(axis=1)
        probabilities = np.where(probabilities >= floor[:, None], probabilities, 0)
    limited = (rules.top_k > 0) & (rules.top_k < probabilities.shape[1])
    if not (limited | (rules.top_p < 1)).any():
        return probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    descending = np.take_along_axis(probabilities, order, 1)
    ranks = np.arange(descending.shape[1])
    limit = np.where(limited, rules.top_k, descending.shape[1])
    descending = np.where(ranks < limit[:, None], descending, 0)
    total = descending.sum(axis=1, keepdims=True)
    before = descending.cumsum(axis=1) - descending
    descending = np.where(before < rules.top_p[:, None] * total, descending, 0)
    kept = np.empty_like(descending)
    np.put_along_axis(kept, order, descending, 1)
    return kept


def uniforms(seeds: UInt64, positions: Int32) -> Float64:
    """float64[B] in [0, 1): the `positions`-th number of each stream `seeds`.

    SplitMix64's output function (Steele, Lea, Flood 2014), applied to the seed first so that neighbouring seeds do
    not give shifted copies of one stream.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: UInt64) -> UInt64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
