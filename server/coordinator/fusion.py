"""Fusion of several experts' truncated distributions over one vocabulary. Pure functions on NumPy arrays, batched over rows.

Letters: B rows, E experts, K top-k, X exact ids a row, U candidates a row, V vocabulary. Absent ids are -1, absent
log-probabilities -inf. Log-probabilities are natural and normalised over the whole vocabulary by the expert itself:
its top-k is never renormalised, since that would inflate each expert's kept mass by a different factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

_ABSENT = np.iinfo(np.int32).max
_NO_MASS = 1e-9
"""Residual mass below float32's resolution of 1: what a top-k that holds everything leaves."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that may be chosen.

    `ids` int32[B, U]: unique and ascending in each row, then -1. `columns` int64[B, E*K + X]: where each id that went
    in, experts first, exact ids last, stands in `ids`.
    """

    ids: Int32
    columns: Int64


def union(ids: Int32, exact_ids: Int32) -> Candidates:
    """Candidates of `ids` [B, E, K] and `exact_ids` [B, X]."""
    rows = len(ids)
    flat = np.concatenate([ids.reshape(rows, -1), exact_ids], axis=1)
    flat = np.where(flat < 0, _ABSENT, flat)
    order = np.argsort(flat, axis=1, kind="stable")
    ascending = np.take_along_axis(flat, order, 1)
    rank = np.zeros(flat.shape, np.int64)
    np.cumsum(ascending[:, 1:] != ascending[:, :-1], axis=1, out=rank[:, 1:])
    unique = np.full((rows, int(rank[:, -1].max()) + 1 if rows else 1), _ABSENT, np.int32)
    np.put_along_axis(unique, rank, ascending, 1)
    columns = np.empty_like(rank)
    np.put_along_axis(columns, order, rank, 1)
    return Candidates(np.where(unique == _ABSENT, np.int32(-1), unique), columns)


@dataclass(frozen=True, slots=True)
class Table:
    """Every expert's log-probability for every candidate: `logprobs` float32[B, E, U], `listed` bool[B, E, U].

    `listed` says that the expert itself gave the value; where it did not, `fill_tail` estimates it.
    """

    logprobs: Float32
    listed: Bool


def tabulate(candidates: Candidates, ids: Int32, logprobs: Float32, exact_logprobs: Float32) -> Table:
    """Spread `logprobs` [B, E, K] of `ids` [B, E, K], and `exact_logprobs` [B, E, X], over the candidates."""
    rows, experts, k = ids.shape
    shape = (rows, experts, candidates.ids.shape[1])
    values, listed = np.full(shape, -np.inf, np.float32), np.zeros(shape, bool)
    exact_columns = candidates.columns[:, experts * k :]
    for expert in range(experts):
        columns = candidates.columns[:, expert * k : (expert + 1) * k]
        np.put_along_axis(values[:, expert], columns, logprobs[:, expert], 1)
        np.put_along_axis(listed[:, expert], columns, ids[:, expert] >= 0, 1)
        if exact_columns.shape[1]:
            np.put_along_axis(values[:, expert], exact_columns, exact_logprobs[:, expert], 1)
            np.put_along_axis(listed[:, expert], exact_columns, True, 1)
    listed &= (candidates.ids >= 0)[:, None, :]
    return Table(values, listed)


def fill_tail(table: Table, smallest: Float32, vocabulary: int) -> Float32:
    """float32[B, E, U]: `table.logprobs`, and where an expert did not list a candidate, its tail estimate.

    `smallest` [B, E] is the last log-probability of each expert's top-k. The estimate is log min(k-th probability,
    residual mass / number of unlisted tokens): the first bounds every unlisted token, the second is their mean.
    """
    listed = np.where(table.listed, table.logprobs, -np.inf)
    residual = np.maximum(1.0 - np.exp(listed).sum(axis=2, dtype=np.float64), _NO_MASS)
    unseen = np.maximum(vocabulary - table.listed.sum(axis=2), 1)
    tail = np.minimum(smallest, np.log(residual / unseen)).astype(np.float32)
    return np.where(table.listed, table.logprobs, tail[:, :, None])


def combine(
    values: Float32, listed: Bool, ids: Int32, coefficients: Float32, prob_space: Bool, allowed: Bool | None = None
) -> Float32:
    """Fused log-probabilities float32[B, U], normalised over the candidates; -inf where a token cannot be chosen.

    `values`, `listed` [B, E, U]; `ids` [B, U]; `coefficients` [B, E]; `prob_space` [B]: which rows mix probabilities,
    sum_i w_i p_i, rather than log-probabilities, sum_i c_i log p_i. `allowed` [B, U] masks further.

    A candidate that an expert with a negative coefficient did not list has no upper bound, so it is masked.
    """
    used = (coefficients != 0)[:, :, None]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        weighted = np.where(used, coefficients[:, :, None] * values, np.float32(0))
        fused = weighted.sum(axis=1)
        if prob_space.any():
            mixed = np.log(np.where(used, coefficients[:, :, None] * np.exp(values), np.float32(0)).sum(axis=1))
            fused = np.where(prob_space[:, None], mixed, fused)
    possible = ids >= 0
    if (coefficients < 0).any():
        possible &= ((coefficients >= 0)[:, :, None] | (listed & np.isfinite(values))).all(axis=1)
    if allowed is not None:
        possible &= allowed
    return normalise(np.where(possible & ~np.isnan(fused), fused, np.float32(-np.inf)))


def normalise(scores: Float32) -> Float32:
    """Log-softmax over the last axis; a row of -inf stays one."""
    best = scores.max(axis=-1, keepdims=True)
    best = np.where(np.isfinite(best), best, np.float32(0))
    shifted = scores - best
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def entropy(logprobs: Float32, vocabulary: int) -> Float32:
    """Entropy in nats float32[B, E] of top-k lists [B, E, K], the unlisted mass spread evenly over the unlisted tokens."""
    p = np.exp(logprobs)
    listed = -np.where(p > 0, p * np.where(p > 0, logprobs, 0), 0).sum(axis=2)
    residual = np.clip(1.0 - p.sum(axis=2), 0.0, 1.0)
    unseen = max(vocabulary - logprobs.shape[2], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.where(residual > 0, -residual * np.log(residual / unseen), 0)
    return (listed + rest).astype(np.float32)
