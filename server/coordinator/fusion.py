"""Several experts' distributions over one vocabulary become one: what their lists hold side by side, and the fusion of
their whole rows. What the lists alone say of that fusion is in `server.coordinator.bounds`.

Letters: B rows, E experts, K listed ids, X exact ids a row, U candidates a row, V vocabulary. Absent ids are -1, absent
log-probabilities -inf. Log-probabilities are natural and normalised over the whole vocabulary by the expert itself:
its list is never renormalised, since that would inflate each expert's kept mass by a different factor.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.compiled import compiled


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


def fuse_whole(logprobs: list[Float32], coefficients: list[float], *, prob_space: bool) -> Float32:
    """Scores float32[V], not normalised, from whole rows [V], one for each expert whose coefficient is not 0.

        logprob space:  sum_i c_i log p_i; -inf where one of these experts holds the token for impossible
        prob space:     log sum_i c_i p_i

    A gate learns through the same definition in torch, `gate.fuse`.
    """
    if prob_space:
        return _mixture(logprobs, coefficients)
    scores = np.zeros_like(logprobs[0])
    impossible = np.zeros(0, bool)
    for row, coefficient in zip(logprobs, coefficients, strict=True):
        if row.min() == -np.inf:
            gone = np.isneginf(row)
            impossible = gone | impossible if impossible.size else gone
            row = np.where(gone, np.float32(0), row)
        scores += np.float32(coefficient) * row
    if impossible.size:
        scores[impossible] = -np.inf
    return scores


def _mixture(logprobs: list[Float32], coefficients: list[float]) -> Float32:
    """log sum_i c_i p_i float32[V]; each token's largest p_i is taken out of the sum, which else underflows."""
    peak = np.maximum(np.maximum.reduce(logprobs), np.float32(-1e30))
    total = np.zeros_like(peak)
    for row, coefficient in zip(logprobs, coefficients, strict=True):
        total += np.float32(coefficient) * np.exp(row - peak)
    with np.errstate(divide="ignore"):
        return np.asarray(peak + np.log(total), np.float32)
