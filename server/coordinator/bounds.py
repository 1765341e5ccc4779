"""What top-k lists say about the fused distribution over the whole vocabulary: bounds on every candidate's score, on
the score of any token that nobody listed, and on the mass of all that is not known.

Of a token outside its list an expert says this much: its probability is at most that of the last one listed, and at
most the mass that the list leaves. With coefficients that are not negative this bounds fused scores from above. The
unknown mass is bounded by Hoelder's inequality: sum_x prod_i p_i(x)^a_i <= prod_i (sum_x p_i(x))^a_i for a_i >= 0 that
sum to 1. With a negative coefficient a token that its expert did not list has no upper bound, unless contrastive
decoding's plausibility mask leaves it out.

A score is sum_i c_i log p_i, or log sum_i c_i p_i in prob space, natural logs, not normalised. Letters: B rows, E
experts, U candidates, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64
from server.coordinator.compiled import compiled
from server.coordinator.fusion import CandidateTable

CERTAIN, OPEN, UNBOUNDED = range(3)
VERDICTS = ("certain", "open", "unbounded")

MASS_SLACK = 4e-6
"""What a sum of float32 probabilities may miss of the mass that a list leaves."""


class Rule(NamedTuple):
    """How B rows are fused."""

    coefficients: Float32
    """[B, E]: 0 for experts that are left out."""

    prob_space: Bool
    """[B]: as sum_i c_i p_i rather than sum_i c_i log p_i."""

    leader: Int64
    """[B]: the expert whose plausibility mask holds, -1 for no mask."""

    plausibility: Float32
    """[B]: log of the share of the leader's largest probability that a token must have to it."""

    def only(self, rows: Bool) -> Rule:
        """That of the `rows` bool[B]."""
        return Rule(self.coefficients[rows], self.prob_space[rows], self.leader[rows], self.plausibility[rows])


class Unknown(NamedTuple):
    """A set of tokens of which only bounds are known, for B rows."""

    tokens: Int64
    """[B]: how many they are."""

    mass: Float64
    """[B, E]: the most that each expert gives to them together."""

    largest: Float64
    """[B, E]: log of the most that it gives to one of them."""

    def only(self, rows: Bool) -> Unknown:
        """That of the `rows` bool[B]."""
        return Unknown(self.tokens[rows], self.mass[rows], self.largest[rows])


class Bounds(NamedTuple):
    """Bounds on the scores of B rows."""

    lower: Float64
    """[B, U]: the least that each candidate can have; equal to `upper` where all experts that count listed it."""

    upper: Float64
    """[B, U]: the most; +inf where nothing bounds it."""

    highest: Float64
    """[B]: the most that a token outside the candidates can have; -inf if there is none."""

    log_low: Float64
    """[B]: log of the least that the normaliser, the sum of exp(score) over the vocabulary, can be."""

    log_high: Float64
    """[B]: log of the most."""

    outside: Unknown
    """The tokens outside the candidates."""

    unsettled: Unknown
    """Those, and the candidates whose bounds differ."""

    def log_normalisers(self, rule: Rule, powers: Float64) -> tuple[Float64, Float64]:
        """Logs of the least and the most, [B] each, that the sum of exp(power score) over the vocabulary can be."""
        return log_normalisers(self, rule, powers)

    def only(self, rows: Bool) -> Bounds:
        """Those of the `rows` bool[B]."""
        return Bounds(
            self.lower[rows],
            self.upper[rows],
            self.highest[rows],
            self.log_low[rows],
            self.log_high[rows],
            self.outside.only(rows),
            self.unsettled.only(rows),
        )


@compiled
def bound(table: CandidateTable, smallest: Float32, rule: Rule, vocabulary: int) -> Bounds:
    """The bounds that `table` allows. `smallest` [B, E]: the last log-probability of each expert's list."""
    rows, experts, candidates = table.logprobs.shape
    lower = np.full((rows, candidates), -np.inf)
    upper = np.full((rows, candidates), -np.inf)
    highest, log_low, log_high = np.full(rows, -np.inf), np.full(rows, -np.inf), np.full(rows, -np.inf)
    outside = Unknown(np.zeros(rows, np.int64), np.zeros((rows, experts)), np.full((rows, experts), -np.inf))
    unsettled = Unknown(np.zeros(rows, np.int64), np.zeros((rows, experts)), np.full((rows, experts), -np.inf))
    for row in range(rows):
        count = 0
        while count < candidates and table.ids[row, count] >= 0:
            count += 1
        logprobs, listed = table.logprobs[row, :, :count], table.listed[row, :, :count]
        coefficients, prob_space = rule.coefficients[row], rule.prob_space[row]
        _fill_left(outside.mass[row], outside.largest[row], logprobs, listed, smallest[row], vocabulary)
        largest = outside.largest[row]
        outside.tokens[row] = 0 if _impossible(coefficients, largest, prob_space) else vocabulary - count
        if prob_space:
            _fill_mixture(lower[row, :count], upper[row, :count], logprobs, listed, largest, coefficients)
        else:
            _fill_scores(lower[row, :count], upper[row, :count], logprobs, listed, largest, coefficients)
        if rule.leader[row] >= 0 and count:
            leader = rule.leader[row]
            floor = logprobs[leader].max() + rule.plausibility[row]
            _leave_out(lower[row], upper[row], logprobs[leader], listed[leader], largest[leader], floor)
            if largest[leader] < floor:
                outside.tokens[row] = 0
        highest[row] = _highest(coefficients, largest, prob_space) if outside.tokens[row] else -np.inf
        _fill_unsettled(unsettled, outside, row, lower[row, :count], upper[row, :count], logprobs, listed)
        log_low[row], log_high[row] = _normaliser(lower[row], upper[row], outside, unsettled, rule, row, 1.0)
    return Bounds(lower, upper, highest, log_low, log_high, outside, unsettled)


@compiled
def log_normalisers(bounds: Bounds, rule: Rule, powers: Float64) -> tuple[Float64, Float64]:
    """As `Bounds.log_normalisers`."""
    low, high = np.empty(len(powers)), np.empty(len(powers))
    for row in range(len(powers)):
        low[row], high[row] = _normaliser(
            bounds.lower[row], bounds.upper[row], bounds.outside, bounds.unsettled, rule, row, powers[row]
        )
    return low, high


@compiled
def reportable(
    table: CandidateTable, bounds: Bounds, rule: Rule, columns: Int64, wanted: Int32, tolerance: float
) -> Bool:
    """bool[B]: whether the log-probability and the rank of the token in `columns` [B], and those of the `wanted` [B]
    most probable ones, are known: which they are for sure, their values within `tolerance`. True where `wanted` is -1.
    """
    known = np.ones(len(columns), np.bool_)
    for row in range(len(columns)):
        column = columns[row]
        if wanted[row] < 0 or column < 0:
            continue
        lower, upper, cap, count = bounds.lower[row], bounds.upper[row], bounds.highest[row], 0
        for other in range(len(lower)):
            if upper[other] > lower[other]:
                cap = max(cap, upper[other])
        for other in range(len(lower)):
            count += lower[other] > cap
        enough = count >= wanted[row] or cap == -np.inf
        near = bounds.log_high[row] - bounds.log_low[row] <= 2 * tolerance
        known[row] = near and enough and lower[column] > cap
    return known


@compiled
def log_power_sum(unknown: Unknown, row: int, coefficients: Float32, prob_space: bool, power: float) -> float:
    """log of the most that the sum of exp(power score) over a set of tokens can be; no coefficient is negative.

    With h the score at exponents that sum to 1, the sum of h is bounded by its largest mass (in prob space) or by
    Hoelder's inequality, and the sum of h^s by (largest h)^(s-1) sum h for s >= 1, by count^(1-s) (sum h)^s for s < 1.
    """
    count = unknown.tokens[row]
    if count <= 0:
        return -np.inf
    mass, peak, weight = 0.0, 0.0, 0.0
    for expert in range(len(coefficients)):
        share = coefficients[expert]
        if share != 0:
            weight += share
            if prob_space:
                mass += share * unknown.mass[row, expert]
                peak += share * np.exp(unknown.largest[row, expert])
            else:
                mass += share * np.log(unknown.mass[row, expert])
                peak += share * unknown.largest[row, expert]
    if weight == 0:
        return -np.inf
    if prob_space:
        exponent, mass, peak = power, np.log(mass), np.log(peak)
    else:
        exponent, mass, peak = power * weight, mass / weight, peak / weight
    if mass == -np.inf or peak == -np.inf:
        return -np.inf
    apart = np.log(count) + exponent * peak
    together = (exponent - 1) * peak + mass if exponent >= 1 else (1 - exponent) * np.log(count) + exponent * mass
    return float(min(apart, together))


@compiled
def winner(ids: Int32, lower: Float64, upper: Float64, highest: float) -> int:
    """The column of the token with the highest score, of equals the one with the lowest of `ids` [U]; -1 where bounds
    [U], and `highest` for all other tokens, do not settle it."""
    best = -1
    for column in range(len(ids)):
        if lower[column] > -np.inf:
            ahead = lower[column] - lower[best] if best >= 0 else np.inf
            if ahead > 0 or (ahead == 0 and ids[column] < ids[best]):
                best = column
    if best < 0 or highest >= lower[best]:
        return -1
    for column in range(len(ids)):
        rival = upper[column] > lower[best] or (upper[column] == lower[best] and lower[column] < upper[column])
        if column != best and rival:
            return -1
    return best


@compiled
def verdict(ids: Int32, bounds: Bounds, row: int) -> int:
    """Whether the lists alone settle which token is the most probable one, before penalties and temperature."""
    if winner(ids, bounds.lower[row], bounds.upper[row], bounds.highest[row]) >= 0:
        return CERTAIN
    unbounded = bounds.highest[row] == np.inf or bounds.upper[row].max() == np.inf
    return UNBOUNDED if unbounded else OPEN


@compiled
def _fill_left(
    mass: Float64, largest: Float64, logprobs: Float32, listed: Bool, smallest: Float32, vocabulary: int
) -> None:
    """Write what each expert's list leaves, and the log of the most that a token outside it has: both [E]."""
    for expert in range(len(mass)):
        total, seen = 0.0, 0
        for column in range(logprobs.shape[1]):
            if listed[expert, column]:
                total += np.exp(logprobs[expert, column])
                seen += 1
        if seen < vocabulary and smallest[expert] > -np.inf:
            mass[expert] = max(1.0 - total, 0.0) + MASS_SLACK
            largest[expert] = min(np.float64(smallest[expert]), np.log(mass[expert]))


@compiled
def _impossible(coefficients: Float32, largest: Float64, prob_space: bool) -> bool:
    """Whether an expert with any weight, whose list holds all that it holds for possible, rules out all other tokens:
    under a grammar."""
    return not prob_space and ((coefficients != 0) & (largest == -np.inf)).any()


@compiled
def _fill_scores(
    lower: Float64, upper: Float64, logprobs: Float32, listed: Bool, largest: Float64, coefficients: Float32
) -> None:
    """Write the bounds [U] of sum_i c_i log p_i. A token that an expert with any weight holds for impossible is."""
    for column in range(len(lower)):
        total, complete, unbounded, impossible = 0.0, True, False, False
        for expert in range(len(coefficients)):
            if coefficients[expert] == 0:
                continue
            known = listed[expert, column]
            value = np.float64(logprobs[expert, column]) if known else largest[expert]
            complete &= known
            unbounded |= not known and coefficients[expert] < 0
            if value == -np.inf:
                impossible = True
            else:
                total += coefficients[expert] * value
        if not impossible:
            upper[column] = np.inf if unbounded else total
            lower[column] = total if complete else -np.inf


@compiled
def _fill_mixture(
    lower: Float64, upper: Float64, logprobs: Float32, listed: Bool, largest: Float64, coefficients: Float32
) -> None:
    """Write the bounds [U] of log sum_i c_i p_i. The largest p_i is taken out of each sum, which else underflows."""
    for column in range(len(lower)):
        peak = -np.inf
        for expert in range(len(coefficients)):
            if coefficients[expert] > 0:
                value = np.float64(logprobs[expert, column]) if listed[expert, column] else largest[expert]
                peak = max(peak, value)
        if peak == -np.inf:
            continue
        sure, possible = 0.0, 0.0
        for expert in range(len(coefficients)):
            if coefficients[expert] > 0:
                if listed[expert, column]:
                    sure += coefficients[expert] * np.exp(logprobs[expert, column] - peak)
                else:
                    possible += coefficients[expert] * np.exp(largest[expert] - peak)
        lower[column] = peak + np.log(sure)
        upper[column] = peak + np.log(sure + possible) if possible > 0 else lower[column]


@compiled
def _leave_out(lower: Float64, upper: Float64, logprobs: Float32, listed: Bool, largest: float, floor: float) -> None:
    """Apply a leader's plausibility mask: its `logprobs` [U] must reach `floor`."""
    for column in range(len(logprobs)):
        if not listed[column]:
            lower[column] = -np.inf
        if (logprobs[column] if listed[column] else largest) < floor:
            lower[column] = upper[column] = -np.inf


@compiled
def _highest(coefficients: Float32, largest: Float64, prob_space: bool) -> float:
    """The most that a token can have that no expert listed."""
    total = 0.0
    for expert in range(len(coefficients)):
        if coefficients[expert] < 0:
            return np.inf
        if coefficients[expert] > 0:
            part = np.exp(largest[expert]) if prob_space else largest[expert]
            total += coefficients[expert] * part
    return float(np.log(total)) if prob_space else total


@compiled
def _fill_unsettled(
    unsettled: Unknown,
    outside: Unknown,
    row: int,
    lower: Float64,
    upper: Float64,
    logprobs: Float32,
    listed: Bool,
) -> None:
    """Add the candidates whose bounds differ to the tokens outside of the candidates."""
    unsettled.tokens[row] = outside.tokens[row]
    unsettled.mass[row], unsettled.largest[row] = outside.mass[row], outside.largest[row]
    for column in range(len(lower)):
        if upper[column] > lower[column]:
            unsettled.tokens[row] += 1
            for expert in range(len(logprobs)):
                if listed[expert, column]:
                    unsettled.mass[row, expert] += np.exp(logprobs[expert, column])
                    unsettled.largest[row, expert] = max(unsettled.largest[row, expert], logprobs[expert, column])


@compiled
def _normaliser(
    lower: Float64, upper: Float64, outside: Unknown, unsettled: Unknown, rule: Rule, row: int, power: float
) -> tuple[float, float]:
    """As `log_normalisers`, from the bounds [U] of a row. At power 1 that of a mixture is the sum of the coefficients,
    and that of one expert alone is 1."""
    coefficients, prob_space = rule.coefficients[row], rule.prob_space[row]
    alone = coefficients.max() == 1 and np.count_nonzero(coefficients) == 1
    if power == 1 and rule.leader[row] < 0 and (prob_space or alone):
        total = np.log(coefficients.sum())
        return total, total
    low = _log_sum(power * lower)
    if unsettled.tokens[row] and coefficients.min() < 0:
        return low, np.inf
    apart = log_power_sum(outside, row, coefficients, prob_space, power)
    for column in range(len(lower)):
        if upper[column] > lower[column]:
            apart = np.logaddexp(apart, _log_difference(power * upper[column], power * lower[column]))
    if not prob_space:
        apart = min(apart, log_power_sum(unsettled, row, coefficients, prob_space, power))
    return low, np.logaddexp(low, apart)


@compiled
def _log_sum(values: Float64) -> float:
    """log sum exp of `values` [U]."""
    best = float(values.max())
    if best == -np.inf:
        return best
    total = 0.0
    for value in values:
        total += np.exp(value - best)
    return float(best + np.log(total))


@compiled
def _log_difference(larger: float, smaller: float) -> float:
    """log(exp(larger) - exp(smaller))."""
    if larger == np.inf or smaller == -np.inf:
        return larger
    return float(larger + np.log(-np.expm1(smaller - larger)))
