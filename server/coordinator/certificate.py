"""Whether a truncated fusion is sure of its most probable token, without asking any expert for what it did not list.

An expert's unlisted token has a probability of at most the last listed one, and of at most the mass that the list
leaves. With coefficients that are not negative this bounds each candidate's fused score from both sides, and the score
of every token that nobody listed from above. The candidate whose lower bound is above every other's upper bound is
certain. So is one that every expert with a positive coefficient puts first.

With a negative coefficient an unlisted token's score has no upper bound: nothing can be said (contrastive decoding,
proxy-tuning). Bias, penalties and temperature come later and are not considered.

Letters: B rows, E experts, K top-k, U candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32
from server.coordinator.compiled import compiled

CERTAIN, OPEN, UNBOUNDED = range(3)
VERDICTS = ("certain", "open", "unbounded")

_SLACK = 1e-6
"""What float32 sums of probabilities may miss of the mass that a list leaves."""


class Lists(NamedTuple):
    """What the experts listed for one row."""

    tops: Int32
    """[E]: each expert's most probable token."""

    smallest: Float32
    """[E]: the last log-probability of each top-k."""

    candidates: Int32
    """[U]: token ids, then -1."""

    logprobs: Float32
    """[E, U]: the experts' log-probabilities where they listed the candidate."""

    listed: Bool
    """[E, U]: where they did."""


@compiled
def certify(row: Lists, coefficients: Float32, prob_space: bool, vocabulary: int) -> int:
    """The verdict on one row, fused with `coefficients` [E]; `prob_space`: as sum_i c_i p_i rather than
    sum_i c_i log p_i."""
    first, agreed = -1, True
    for expert in range(len(coefficients)):
        if coefficients[expert] < 0:
            return UNBOUNDED
        if coefficients[expert] > 0:
            agreed &= first < 0 or first == row.tops[expert]
            first = row.tops[expert]
    if agreed:
        return CERTAIN if first >= 0 else OPEN
    count = 0
    while count < len(row.candidates) and row.candidates[count] >= 0:
        count += 1
    lower, upper, nobody = np.zeros(count), np.zeros(count), 0.0
    for expert in range(len(coefficients)):
        if coefficients[expert] > 0:
            tail = _tail(row.logprobs[expert, :count], row.listed[expert, :count], row.smallest[expert], vocabulary)
            nobody += _part(coefficients[expert], tail, prob_space)
            for column in range(count):
                known = row.listed[expert, column]
                value = row.logprobs[expert, column] if known else tail
                upper[column] += _part(coefficients[expert], value, prob_space)
                lower[column] += _part(coefficients[expert], value if known else -np.inf, prob_space)
    winner = lower.argmax()
    if count < vocabulary and nobody >= lower[winner]:
        return OPEN
    for column in range(count):
        if column != winner and upper[column] >= lower[winner]:
            return OPEN
    return CERTAIN


@compiled
def _tail(values: Float32, listed: Bool, smallest: float, vocabulary: int) -> float:
    """The largest log-probability that a token outside an expert's list can have."""
    mass, seen = 0.0, 0
    for column in range(len(values)):
        if listed[column]:
            mass += np.exp(values[column])
            seen += 1
    if seen >= vocabulary:
        return -np.inf
    return min(smallest, float(np.log(max(1.0 - mass, 0.0) + _SLACK)))


@compiled
def _part(coefficient: float, logprob: float, prob_space: bool) -> float:
    """What an expert contributes to a score."""
    return coefficient * float(np.exp(logprob)) if prob_space else coefficient * logprob
