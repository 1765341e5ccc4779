"""Fusion of several experts' truncated distributions over one vocabulary. Pure functions on arrays, batched over rows.

Letters: B rows, E experts, K top-k, X exact ids a row, U candidates a row, V vocabulary. Absent ids are -1, absent
log-probabilities -inf. Log-probabilities are natural and normalised over the whole vocabulary by the expert itself:
its top-k is never renormalised, since that would inflate each expert's kept mass by a different factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.compiled import compiled

NO_MASS = 1e-9
"""Residual mass below float32's resolution of 1: what a top-k that holds everything leaves."""


@dataclass(frozen=True, slots=True)
class CandidateTable:
    """The tokens that may be chosen, and what each expert says of them.

    `ids` int32[B, U]: unique in each row, then -1 (at least one); `logprobs` float32[B, E, U]; `listed` bool[B, E, U]:
    the expert itself gave the value; `exact_columns` int64[B, X]: where each row's exact ids stand.
    """

    ids: Int32
    logprobs: Float32
    listed: Bool
    exact_columns: Int64

    def only(self, rows: Bool) -> CandidateTable:
        """The table of the `rows` bool[B]."""
        return CandidateTable(self.ids[rows], self.logprobs[rows], self.listed[rows], self.exact_columns[rows])


def tabulate(
    ids: Int32, logprobs: Float32, exact_ids: Int32, exact_logprobs: Float32, vocabulary: int
) -> CandidateTable:
    """The union of `ids` [B, E, K] and `exact_ids` [B, X] with what is known: `logprobs` [B, E, K] and
    `exact_logprobs` [B, E, X]. What an expert did not list is -inf."""
    return CandidateTable(*_tabulate(ids, logprobs, exact_ids, exact_logprobs, vocabulary))


def fill_tail(table: CandidateTable, smallest: Float32, vocabulary: int) -> Float32:
    """float32[B, E, U]: `table.logprobs`, and where an expert did not list a candidate, its tail estimate.

    `smallest` [B, E] is the last log-probability of each expert's top-k. The estimate is log min(k-th probability,
    residual mass / number of unlisted tokens): the first bounds every unlisted token, the second is their mean.
    """
    return _fill_tail(table.logprobs, table.listed, smallest, vocabulary)


def combine(
    values: Float32, table: CandidateTable, coefficients: Float32, prob_space: Bool, allowed: Bool | None = None
) -> Float32:
    """Fused log-probabilities float32[B, U], normalised over the candidates; -inf where a token cannot be chosen.

    `values` [B, E, U]; `coefficients` [B, E]; `prob_space` [B]: which rows mix probabilities, sum_i w_i p_i, rather
    than log-probabilities, sum_i c_i log p_i. `allowed` [B, U] masks further.

    A candidate that an expert with a negative coefficient did not list has no upper bound, so it is masked; but where
    that leaves nothing, the estimates have to do.
    """
    mask = table.ids >= 0 if allowed is None else (table.ids >= 0) & allowed
    return _combine(values, table.listed, mask, coefficients, prob_space)


@compiled
def entropy(logprobs: Float32, vocabulary: int) -> Float32:
    """Entropy in nats float32[B, E] of top-k lists [B, E, K], the unlisted mass spread over the unlisted tokens."""
    rows, experts, k = logprobs.shape
    result = np.zeros((rows, experts), np.float32)
    for row in range(rows):
        for expert in range(experts):
            total, mass = 0.0, 0.0
            for rank in range(k):
                logprob = logprobs[row, expert, rank]
                if logprob > -np.inf:
                    mass += np.exp(logprob)
                    total -= np.exp(logprob) * logprob
            residual = 1.0 - mass
            if residual > NO_MASS:
                total -= residual * np.log(residual / max(vocabulary - k, 1))
            result[row, expert] = total
    return result


@compiled
def _tabulate(
    ids: Int32, logprobs: Float32, exact_ids: Int32, exact_logprobs: Float32, vocabulary: int
) -> tuple[Int32, Float32, Bool, Int64]:
    rows, experts, k = ids.shape
    exact = exact_ids.shape[1]
    width = experts * k + exact + 1  # the last column stays empty: absent exact ids point there
    unique = np.full((rows, width), -1, np.int32)
    values = np.full((rows, experts, width), -np.inf, np.float32)
    listed = np.zeros((rows, experts, width), np.bool_)
    columns = np.full((rows, exact), width - 1, np.int64)
    column_of = np.full(vocabulary, -1, np.int64)
    for row in range(rows):
        count = 0
        for expert in range(experts):
            for rank in range(k):
                token = ids[row, expert, rank]
                if token < 0:
                    continue
                if column_of[token] < 0:
                    column_of[token] = count
                    unique[row, count] = token
                    count += 1
                values[row, expert, column_of[token]] = logprobs[row, expert, rank]
                listed[row, expert, column_of[token]] = True
        for index in range(exact):
            token = exact_ids[row, index]
            if token < 0:
                continue
            if column_of[token] < 0:
                column_of[token] = count
                unique[row, count] = token
                count += 1
            columns[row, index] = column_of[token]
            for expert in range(experts):
                values[row, expert, column_of[token]] = exact_logprobs[row, expert, index]
                listed[row, expert, column_of[token]] = True
        for column in range(count):
            column_of[unique[row, column]] = -1
    return unique, values, listed, columns


@compiled
def _fill_tail(logprobs: Float32, listed: Bool, smallest: Float32, vocabulary: int) -> Float32:
    values = logprobs.copy()
    rows, experts, candidates = logprobs.shape
    for row in range(rows):
        for expert in range(experts):
            mass, seen = 0.0, 0
            for column in range(candidates):
                if listed[row, expert, column]:
                    mass += np.exp(logprobs[row, expert, column])
                    seen += 1
            mean = max(1.0 - mass, NO_MASS) / max(vocabulary - seen, 1)
            tail = min(smallest[row, expert], np.float32(np.log(mean)))
            for column in range(candidates):
                if not listed[row, expert, column]:
                    values[row, expert, column] = tail
    return values


@compiled
def _combine(values: Float32, listed: Bool, allowed: Bool, coefficients: Float32, prob_space: Bool) -> Float32:
    rows, experts, candidates = values.shape
    fused = np.full((rows, candidates), -np.inf, np.float32)
    for row in range(rows):
        best = -np.inf
        for bounded_only in (True, False):
            for column in range(candidates):
                if not allowed[row, column]:
                    continue
                score, highest = 0.0, np.float32(-np.inf)
                if prob_space[row]:  # taken out of the sum, which else underflows below exp(-103)
                    for expert in range(experts):
                        if coefficients[row, expert] != 0:
                            highest = max(highest, values[row, expert, column])
                for expert in range(experts):
                    coefficient, value = coefficients[row, expert], values[row, expert, column]
                    if coefficient == 0:
                        continue
                    bounded = value > -np.inf and (listed[row, expert, column] or not bounded_only)
                    if coefficient < 0 and not bounded:
                        score = np.nan
                    elif prob_space[row]:
                        score += coefficient * np.exp(value - highest)
                    else:
                        score += coefficient * value
                if prob_space[row]:
                    score = highest + np.log(score) if score > 0 else -np.inf
                if score > -np.inf:  # false for NaN too
                    fused[row, column] = score
                    best = max(best, score)
            if best > -np.inf:
                break
        if best > -np.inf:
            total = 0.0
            for column in range(candidates):
                total += np.exp(fused[row, column] - best)
            fused[row] -= best + np.log(total)
    return fused
