"""Samples one token a row from the fused distribution: penalties, temperature, min_p, top_k, top_p, in vLLM's order.

Batched over rows. The random number of a row depends on its seed and position alone (a counter-based generator), so a
sequence gives the same text alone, in a batch, and after a restart.

Letters: B rows, U candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64, UInt64
from server.coordinator.compiled import compiled


class Rules(NamedTuple):
    """Sampling parameters of B rows, as in `server.request.SamplingParams`."""

    temperature: Float32
    """[B]: 0 takes the most probable token."""

    top_p: Float32
    """[B]: 1 keeps all."""

    top_k: Int32
    """[B]: 0 keeps all."""

    min_p: Float32
    """[B]: 0 keeps all."""

    def of(self, rows: Int64) -> Rules:
        """The rules of the `rows` [B']."""
        return Rules(self.temperature[rows], self.top_p[rows], self.top_k[rows], self.min_p[rows])


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of those rows that have any: the parameters, and how often each candidate has occurred."""

    presence: Float32
    """[B]: subtracted from the score of a token that was generated."""

    frequency: Float32
    """[B]: subtracted for each time that it was generated."""

    repetition: Float32
    """[B]: divides the score of a token that was seen."""

    output_counts: Int32
    """[B, U]: occurrences in the generated tokens."""

    seen: Bool
    """[B, U]: in the prompt or the generated tokens."""


def penalise(scores: Float32, penalties: Penalties) -> Float32:
    """OpenAI's presence and frequency penalties and the repetition penalty (arXiv 1909.05858) on scores [B, U].

    The repetition penalty divides positive logits and multiplies negative ones. Scores are log-probabilities, logits
    that are never positive, but for what a bias added to them.
    """
    repetition = np.where(penalties.seen, penalties.repetition[:, None], np.float32(1))
    counts = penalties.output_counts
    scores = np.where(scores > 0, scores / repetition, scores * repetition)
    return np.asarray(
        scores - penalties.frequency[:, None] * counts - penalties.presence[:, None] * (counts > 0), np.float32
    )


@compiled
def uniforms(seeds: UInt64, positions: Int32) -> Float64:
    """float64[B] in [0, 1): the `positions`-th number of each stream `seeds`.

    SplitMix64's output function (Steele, Lea, Flood 2014), applied to the seed first so that neighbouring seeds do
    not give shifted copies of one stream.
    """
    result = np.empty(len(seeds), np.float64)
    for row in range(len(seeds)):
        step = np.uint64(positions[row]) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _mix(_mix(seeds[row]) + step)
        result[row] = np.float64(mixed >> np.uint64(11)) * 2.0**-53
    return result


@compiled
def _mix(x: np.uint64) -> np.uint64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def choose(ids: Int32, scores: Float32, rules: Rules, uniforms: Float64) -> Int64:
    """Column int64[B] of the token sampled in each row of `scores` [B, U] (log-probabilities, -inf: impossible).

    `uniforms` float64[B] in [0, 1). Temperature 0 takes the maximum, of equals the one with the lowest of `ids`
    [B, U]. Sampling goes through the candidates in the order of their ids, so the order in which experts listed them
    does not matter.
    """
    chosen = np.zeros(len(scores), np.int64)
    for row in range(len(scores)):
        best = 0
        for column in range(scores.shape[1]):
            ahead = scores[row, column] - scores[row, best]
            if ahead > 0 or (ahead == 0 and ids[row, column] < ids[row, best]):
                best = column
        chosen[row] = best
        if rules.temperature[row] <= 0 or scores[row, best] == -np.inf:
            continue
        heat = np.float64(rules.temperature[row])
        probabilities = np.exp((scores[row].astype(np.float64) - scores[row, best]) / heat)
        by_id = np.argsort(ids[row])
        _truncate(probabilities, by_id, rules.top_p[row], rules.top_k[row], rules.min_p[row])
        point = uniforms[row] * probabilities.sum()
        reached = 0.0
        for column in by_id:
            if probabilities[column] > 0:
                reached += probabilities[column]
                chosen[row] = column
                if reached > point:
                    break
    return chosen


@compiled
def _truncate(probabilities: Float64, by_id: Int64, top_p: float, top_k: int, min_p: float) -> None:
    """Zero, in place, what min_p, top_k and top_p leave out, in this order, of unnormalised `probabilities` [U]. Of
    equals the first of the columns `by_id` [U] stay."""
    if min_p > 0:
        floor = min_p * probabilities.max()
        probabilities[probabilities < floor] = 0
    if top_p >= 1 and not 0 < top_k < len(probabilities):
        return
    order = by_id[np.argsort(-probabilities[by_id], kind="mergesort")]
    if 0 < top_k < len(probabilities):
        probabilities[order[top_k:]] = 0
    if top_p < 1:
        limit, before = top_p * probabilities.sum(), 0.0
        for column in order:
            kept = before < limit
            before += probabilities[column]
            if not kept:
                probabilities[column] = 0
