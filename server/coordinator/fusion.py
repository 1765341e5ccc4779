"""Fusion of several experts' truncated distributions over one vocabulary. Pure functions on arrays, batched over rows.

Letters: B rows, E experts, K top-k, X exact ids a row, U candidates a row, V vocabulary. Absent ids are -1, absent
log-probabilities -inf. Log-probabilities are natural and normalised over the whole vocabulary by the expert itself:
its top-k is never renormalised, since that would inflate each expert's kept mass by a different factor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64
from server.coordinator.compiled import compiled

NO_MASS = 1e-9
"""Residual mass below float32's resolution of 1: what a top-k that holds everything leaves."""


class CandidateTable(NamedTuple):
    """The tokens that may be chosen, and what each expert says of them."""

    ids: Int32
    """[B, U]: unique in each row, then -1 (at least one)."""

    logprobs: Float32
    """[B, E, U]: -inf where the expert did not list the token."""

    listed: Bool
    """[B, E, U]: the expert itself gave the value."""

    exact_columns: Int64
    """[B, X]: where each row's exact ids stand."""

    def only(self, rows: Bool) -> CandidateTable:
        """The table of the `rows` bool[B]."""
        return CandidateTable(self.ids[rows], self.logprobs[rows], self.listed[rows], self.exact_columns[rows])


@compiled
def tabulate(
    ids: Int32, logprobs: Float32, exact_ids: Int32, exact_logprobs: Float32, vocabulary: int
) -> CandidateTable:
    """The union of `ids` [B, E, K] and `exact_ids` [B, X] with what is known: `logprobs` [B, E, K] and
    `exact_logprobs` [B, E, X]. What an expert did not list is -inf."""
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
    return CandidateTable(unique, values, listed, columns)


@compiled
def fill_tail(table: CandidateTable, smallest: Float32, vocabulary: int) -> Float32:
    """float32[B, E, U]: `table.logprobs`, and where an expert did not list a candidate, its tail estimate.

    `smallest` [B, E] is the last log-probability of each expert's top-k. The estimate is log min(k-th probability,
    residual mass / number of unlisted tokens): the first bounds every unlisted token, the second is their mean.
    """
    logprobs, listed = table.logprobs, table.listed
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
def fused_scores(coefficients: Float32, logprobs: Float32, prob_space: bool) -> Float64:
    """The equation: the scores float64[U] of a row's candidates before they are normalised, by the coefficients c [E]
    and the experts' log p [E, U].

        logprob space:  sum_i c_i log p_i
        prob space:     log sum_i c_i p_i, and -inf where the sum is not positive

    An expert with c_i = 0 may say anything. In prob space a candidate's largest p_i is taken out of the sum, which else
    underflows below exp(-103) in float32.
    """
    experts, candidates = logprobs.shape
    scores = np.zeros(candidates)
    shift = _largest(coefficients, logprobs) if prob_space else np.zeros(candidates, np.float32)
    for expert in range(experts):
        if coefficients[expert] != 0:
            for token in range(candidates):
                logprob = logprobs[expert, token]
                scores[token] += coefficients[expert] * (np.exp(logprob - shift[token]) if prob_space else logprob)
    if prob_space:
        for token in range(candidates):
            scores[token] = shift[token] + np.log(scores[token]) if scores[token] > 0 else -np.inf
    return scores


@compiled
def _largest(coefficients: Float32, logprobs: Float32) -> Float32:
    """float32[U]: each candidate's largest log-probability, of experts whose coefficient is not 0."""
    experts, candidates = logprobs.shape
    largest = np.full(candidates, -np.inf, np.float32)
    for expert in range(experts):
        if coefficients[expert] != 0:
            for token in range(candidates):
                largest[token] = max(largest[token], logprobs[expert, token])
    return largest


def combine(
    values: Float32, table: CandidateTable, coefficients: Float32, prob_space: Bool, allowed: Bool | None = None
) -> Float32:
    """`fused_scores` of all candidates, normalised: log-probabilities float32[B, U], -inf where none can be chosen.

    `values` [B, E, U]; `coefficients` [B, E]; `prob_space` [B]: which rows mix probabilities rather than
    log-probabilities. `allowed` [B, U] masks further.

    A candidate that an expert with a negative coefficient did not list has no upper bound, so it is masked; but where
    that leaves nothing, the estimates have to do.

    A gate learns through the same definition in torch, `gate.fuse`.
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
def _combine(values: Float32, listed: Bool, allowed: Bool, coefficients: Float32, prob_space: Bool) -> Float32:
    fused = np.full(allowed.shape, -np.inf, np.float32)
    for row in range(len(fused)):
        scores = fused_scores(coefficients[row], values[row], prob_space[row])
        for estimates in (False, True):
            bounded = _bounded(coefficients[row], values[row], listed[row], estimates)
            if _fill_normalised(fused[row], scores, allowed[row], bounded):
                break
    return fused


@compiled
def _bounded(coefficients: Float32, logprobs: Float32, listed: Bool, estimates: bool) -> Bool:
    """bool[U]: whether each candidate's score has an upper bound. Where a coefficient is negative, its expert must have
    listed the candidate (unless `estimates` will do), and not as impossible."""
    experts, candidates = logprobs.shape
    bounded = np.ones(candidates, np.bool_)
    for expert in range(experts):
        if coefficients[expert] < 0:
            for token in range(candidates):
                bounded[token] &= (listed[expert, token] or estimates) and logprobs[expert, token] > -np.inf
    return bounded


@compiled
def _fill_normalised(fused: Float32, scores: Float64, allowed: Bool, bounded: Bool) -> bool:
    """Write into `fused` [U] the `scores` of the candidates that are `allowed` and `bounded`, normalised; whether there
    is one above -inf."""
    best = -np.inf
    for token in range(len(scores)):
        if allowed[token] and bounded[token] and scores[token] > -np.inf:  # false for NaN too
            fused[token] = scores[token]
            best = max(best, scores[token])
    if best == -np.inf:
        return False
    total = 0.0
    for token in range(len(scores)):
        total += np.exp(fused[token] - best)
    fused -= best + np.log(total)
    return True
