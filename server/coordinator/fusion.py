"""Several experts' distributions over one vocabulary become one: what their lists hold side by side, and the fusion of
their whole rows. What the lists alone say of that fusion is in `server.coordinator.bounds`.

Letters: B rows, E experts, K listed ids, X exact ids a row, U candidates a row, V vocabulary. Absent ids are -1, absent
log-probabilities -inf. Log-probabilities are natural and normalised over the whole vocabulary by the expert itself:
its list is never renormalised, since that would inflate each expert's kept mass by a different factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

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


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for the fusion of one whole row after another: what is allocated anew is paged in anew."""

    scores: Float32
    """[V]."""

    sum: Float32
    """[V]."""

    scratch: Float32
    """[V]."""

    @classmethod
    def of(cls, vocabulary: int) -> Self:
        """Room for rows of that many tokens."""
        return cls(*np.empty((3, vocabulary), np.float32))


def fuse_whole(logprobs: list[Float32], coefficients: list[float], *, prob_space: bool, room: Room) -> Float32:
    """Scores float32[V], not normalised, in `room`, from whole rows [V], one for each expert whose coefficient is not
    0.

        logprob space:  sum_i c_i log p_i; -inf where one of these experts holds the token for impossible
        prob space:     log sum_i c_i p_i

    A gate learns through the same definition in torch, `gate.fuse`.
    """
    return (_mixture if prob_space else _product)(logprobs, coefficients, room)


def _product(logprobs: list[Float32], coefficients: list[float], room: Room) -> Float32:
    """sum_i c_i log p_i."""
    scores, scratch = room.scores, room.scratch
    impossible: list[Bool] = []
    scores[:] = 0
    with np.errstate(invalid="ignore"):
        for row, coefficient in zip(logprobs, coefficients, strict=True):
            if row.min() == -np.inf:
                impossible.append(np.isneginf(row))
            np.multiply(row, np.float32(coefficient), out=scratch)
            np.add(scores, scratch, out=scores)
    for gone in impossible:
        scores[gone] = -np.inf
    return scores


def _mixture(logprobs: list[Float32], coefficients: list[float], room: Room) -> Float32:
    """log sum_i c_i p_i; each token's largest p_i is taken out of the sum, which else underflows."""
    scores, total, scratch = room.scores, room.sum, room.scratch
    scores[:], total[:] = -1e30, 0
    for row in logprobs:
        np.maximum(scores, row, out=scores)
    for row, coefficient in zip(logprobs, coefficients, strict=True):
        np.subtract(row, scores, out=scratch)
        np.exp(scratch, out=scratch)
        np.multiply(scratch, np.float32(coefficient), out=scratch)
        np.add(total, scratch, out=total)
    with np.errstate(divide="ignore"):
        np.log(total, out=total)
    return np.add(scores, total, out=scores)


def log_sum(scores: Float32, scratch: Float32) -> float:
    """log sum exp of `scores` [V], -inf if nothing is possible; `scratch` [V] is overwritten."""
    best = scores.max()
    if best == -np.inf:
        return -np.inf
    np.subtract(scores, best, out=scratch)
    np.exp(scratch, out=scratch)
    return float(best) + float(np.log(scratch.sum(dtype=np.float64)))
