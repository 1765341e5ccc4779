"""Samples one token a row from the fused distribution: penalties, temperature, min_p, top_k, top_p, in vLLM's order.

`choose` samples from bounds on the distribution, exactly, by rejection. Its envelope is the part of each candidate's
weight that is sure, and one more atom: as much as all that is not sure can weigh. A candidate that comes up is taken as
it is. Only where the atom comes up must the whole row be known; `choose_whole` goes on from there, by the same random
number: with the probability that what was not sure weighs, of what it was held to weigh at most, a token from that;
else a new one from the whole row. The law is that of the whole row, however loose the bounds are.

The random numbers of a row depend on its seed and position alone (a counter-based generator), so a sequence gives the
same text alone, in a batch, and after a restart.

Letters: B rows, U candidates, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64, UInt64
from server.coordinator.bounds import Bounds, Rule, log_power_sum, winner
from server.coordinator.compiled import compiled
from server.coordinator.truncation import Cut, Left, Weights, truncate, truncate_whole

SMALLEST = 1e-20
"""A temperature, a top_p or a repetition penalty below this means the same as this, which float32 can divide by."""

_MUCH = 1e6
"""Where the atom weighs more than so many times what is sure, sampling starts afresh from the whole row, in its own
units."""

_COARSE = 1e4
"""At exponents of this size float32 does not tell what the lists say of a weight from what the whole row says."""

_ROUNDING = 1e-5
"""Relative: where a weight is beyond its sure part by no more, the two are one number in two precisions."""


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

    def row(self, row: int) -> SamplingRule:
        """Those of one row."""
        return SamplingRule(
            float(self.temperature[row]), float(self.top_p[row]), int(self.top_k[row]), float(self.min_p[row])
        )


class SamplingRule(NamedTuple):
    """The sampling parameters of one row."""

    temperature: float
    """0 takes the most probable token."""

    top_p: float
    """1 keeps all."""

    top_k: int
    """0 keeps all."""

    min_p: float
    """0 keeps all."""


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


def penalise(scores: Float32 | Float64, penalties: Penalties) -> Float32 | Float64:
    """OpenAI's presence and frequency penalties and the repetition penalty (arXiv 1909.05858) on scores [B, U].

    The repetition penalty divides positive logits and multiplies negative ones. Scores are log-probabilities, logits
    that are never positive, but for what a bias added to them.
    """
    repetition = np.where(penalties.seen, penalties.repetition[:, None], np.float32(1))
    counts = penalties.output_counts
    scores = np.where(scores > 0, scores / repetition, scores * repetition)
    return np.asarray(scores - penalties.frequency[:, None] * counts - penalties.presence[:, None] * (counts > 0))


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


class Scores(NamedTuple):
    """Bounds on the scores of B rows after bias, min_tokens and penalties."""

    lower: Float64
    """[B, U]: the least that each candidate can have."""

    upper: Float64
    """[B, U]: the most."""

    highest: Float64
    """[B]: the most that a token outside the candidates can have."""

    plain: Bool
    """[B]: each score that changed was shifted, however it was."""


class Choice(NamedTuple):
    """What bounds say of B rows' tokens."""

    columns: Int64
    """[B]: where the token stands among the candidates, -1 where the whole row must be known."""

    sure: Float64
    """[B, U]: the weight that each candidate is sure to have, in units of exp(`shift`); 0 where it is not sampled."""

    shift: Float64
    """[B]."""

    excess: Float64
    """[B]: how far beyond the sum of `sure` the random number went; +inf where nothing is sure."""

    def row(self, row: int, ids: Int32) -> RowChoice:
        """That of one row, whose candidates are `ids` [U]."""
        return RowChoice(ids, self.sure[row], float(self.shift[row]), float(self.excess[row]))

    def only(self, rows: Bool) -> Choice:
        """Those of the `rows` bool[B]."""
        return Choice(self.columns[rows], self.sure[rows], self.shift[rows], self.excess[rows])


@dataclass(frozen=True, slots=True)
class RowChoice:
    """One row of a `Choice`, and its candidates."""

    ids: Int32
    """[U]: their tokens, -1: none."""

    sure: Float64
    """[U]: as in `Choice`."""

    shift: float
    """As in `Choice`."""

    excess: float
    """As in `Choice`."""


@compiled
def choose(ids: Int32, scores: Scores, bounds: Bounds, rule: Rule, rules: Rules, uniforms: Float64) -> Choice:
    """The tokens of rows with candidates `ids` [B, U], whose `scores` were fused within `bounds` by `rule`, before they
    were adjusted.

    Temperature 0 takes the maximum, of equals the one with the lowest id. Else `uniforms` float64[B] in [0, 1) decide;
    candidates stand in the order of their ids, so the order in which experts listed them does not matter.
    """
    rows, candidates = ids.shape
    columns, sure = np.full(rows, -1, np.int64), np.zeros((rows, candidates))
    shift, excess = np.zeros(rows), np.full(rows, np.inf)
    for row in range(rows):
        lower, upper, highest = scores.lower[row], scores.upper[row], scores.highest[row]
        if rules.temperature[row] <= 0:
            columns[row] = winner(ids[row], lower, upper, highest)
            continue
        power = 1 / np.float64(rules.temperature[row])
        shift[row] = power * lower.max()
        if shift[row] == -np.inf or highest == np.inf:
            continue
        complete = bounds.lower[row] == bounds.upper[row]
        weights = Weights(np.exp(power * lower - shift[row]), np.exp(power * upper - shift[row]), complete, ids[row])
        outside = log_power_sum(bounds.outside, row, rule.coefficients[row], rule.prob_space[row], power)
        jointly = _jointly(bounds, rule, row, power, scores.plain[row])
        left = Left(np.exp(power * highest - shift[row]), np.exp(outside - shift[row]), np.exp(jointly - shift[row]))
        unsure = truncate(weights, left, Cut(rules.top_p[row], rules.top_k[row], rules.min_p[row]), sure[row])
        loosest = 0.0 if max(power, abs(shift[row])) > _COARSE else _MUCH
        columns[row], excess[row] = _envelope(ids[row], sure[row], unsure, loosest, uniforms[row])
    return Choice(columns, sure, shift, excess)


def choose_whole(scores: Float32, rules: SamplingRule, choice: RowChoice, number: float, scratch: Float32) -> int:
    """The token of a row for which `choose` gave no column, from its adjusted scores [V], not normalised: it goes on
    from there. `number` in [0, 1): one more random number of the row's position. `scratch` [V] is overwritten."""
    best = int(scores.argmax())
    if rules.temperature <= 0 or scores[best] == -np.inf:
        return best
    power = np.float32(1 / rules.temperature)
    begun = np.isfinite(choice.excess)
    with np.errstate(over="ignore"):  # to -inf: no weight
        if begun:
            weights = np.multiply(scores, power, out=scratch)
            np.subtract(weights, np.float32(choice.shift), out=weights)
        else:
            weights = np.subtract(scores, scores[best], out=scratch)
            np.multiply(weights, power, out=weights)
    np.exp(weights, out=weights)
    truncate_whole(weights, Cut(rules.top_p, rules.top_k, rules.min_p))
    if begun and (token := _reach_unsure(weights, choice)) >= 0:
        return token
    token = _reach(weights, number * float(weights.sum(dtype=np.float64)))
    return token if token >= 0 else int(np.flatnonzero(weights)[-1])


def _reach_unsure(weights: Float32, choice: RowChoice) -> int:
    """The token that `choice.excess` falls on among what the weights [V] are beyond those that were sure; -1 if it is
    beyond that too."""
    known = np.flatnonzero(choice.sure > 0)
    ids, sure = choice.ids[known], choice.sure[known]
    there = weights[ids]
    beyond = there - sure
    weights[ids] = np.where(beyond > _ROUNDING * sure, beyond, 0)
    token = _reach(weights, choice.excess)
    weights[ids] = there
    return token


@compiled
def _reach(weights: Float32, point: float) -> int:
    """The first index at which the running sum of `weights` [V] is beyond `point`; -1 if it never is."""
    reached = 0.0
    for index in range(len(weights)):
        reached += weights[index]
        if reached > point and weights[index] > 0:
            return index
    return -1


@compiled
def _jointly(bounds: Bounds, rule: Rule, row: int, power: float, plain: bool) -> float:
    """`Left.jointly`, its log: by Hoelder's inequality; in prob space what the lists leave of the mixture, if nothing
    but shifts came after it."""
    coefficients, prob_space = rule.coefficients[row], rule.prob_space[row]
    if not prob_space:
        if coefficients.min() < 0:
            return np.inf
        return log_power_sum(bounds.unsettled, row, coefficients, prob_space, power)
    if power == 1 and plain:
        return float(np.log((coefficients * bounds.outside.mass[row]).sum()))
    return np.inf


@compiled
def _envelope(ids: Int32, sure: Float64, unsure: float, loosest: float, number: float) -> tuple[int, float]:
    """(column, 0) of the candidate whose part of the envelope `number` in [0, 1) falls into; (-1, how far it falls into
    the atom), +inf where that weighs more than `loosest` times what is sure."""
    total = sure.sum()
    if total == 0 or not unsure <= loosest * total:
        return -1, np.inf
    point = number * (total + unsure)
    if point >= total and unsure > 0:
        return -1, point - total
    column, reached = -1, 0.0
    for candidate in np.argsort(ids):
        if sure[candidate] > 0:
            reached += sure[candidate]
            column = candidate
            if reached > point:
                break
    return column, 0.0
