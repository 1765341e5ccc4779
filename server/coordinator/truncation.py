"""What min_p, top_k and top_p leave of a row, in this order: of its whole weights, or of bounds on them.

From bounds it is not always sure what is left. A candidate that surely stays, or surely goes, counts as such; what is
in doubt counts to what must be looked at before it is taken.

Letters: U candidates, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64
from server.coordinator.compiled import compiled


class Cut(NamedTuple):
    """What is left out."""

    top_p: float
    """Keep the largest weights that together are this share; 1 keeps all."""

    top_k: int
    """How many of the largest are kept; 0 keeps all."""

    min_p: float
    """Drop what is smaller than this share of the largest; 0 drops none."""


class Weights(NamedTuple):
    """Bounds on the weights of one row's candidates."""

    low: Float64
    """[U]: the least."""

    high: Float64
    """[U]: the most."""

    complete: Bool
    """[U]: all experts that count listed the candidate."""

    ids: Int32
    """[U]: its token, -1 for none."""


class Left(NamedTuple):
    """Bounds on the weights of what one row's candidates leave."""

    largest: float
    """Of one token outside the candidates."""

    outside: float
    """Of all of them."""

    jointly: float
    """Of all of them and what is not known of the candidates that are not complete; +inf for no such bound."""


class _Order(NamedTuple):
    """The candidates of one row by weight."""

    head: Int64
    """Columns, best first, of those that are known and weigh more than any token outside of the candidates can."""

    loose: Int64
    """Columns, by the most that they weigh, of those that are not known."""


_OUT, _SURE, _DOUBTFUL = range(3)
"""Whether a candidate is left in."""


def truncate_whole(weights: Float32, cut: Cut) -> None:
    """Zero, in place, what min_p, top_k and top_p leave out, in this order, of `weights` [V]. Of equals those with the
    lowest ids stay."""
    if cut.min_p > 0:
        weights[weights < cut.min_p * weights.max()] = 0
    if 0 < cut.top_k < len(weights):
        smallest = np.partition(weights, -cut.top_k)[-cut.top_k]
        equals = np.flatnonzero(weights == smallest)
        room = cut.top_k - np.count_nonzero(weights > smallest)
        weights[weights < smallest] = 0
        weights[equals[room:]] = 0
    if cut.top_p < 1:
        _apply_top_p(weights, cut.top_p)


def _apply_top_p(weights: Float32, top_p: float) -> None:
    """Zero, in place, what top_p leaves out of `weights` [V]. Only those of about the size at which it cuts are sorted:
    floats that are not negative have the order of their bits."""
    sizes = weights.view(np.int32) >> 16
    mass = _masses(sizes, weights)
    above = mass[::-1].cumsum()[::-1] - mass
    limit = top_p * mass.sum()
    size = int(np.flatnonzero(above < limit)[0])
    there = np.flatnonzero(sizes == size)
    there = there[np.argsort(-weights[there], kind="stable")]
    before = above[size] + np.cumsum(weights[there], dtype=np.float64) - weights[there]
    weights[sizes < size] = 0
    weights[there[before >= limit]] = 0


@compiled
def _masses(sizes: Int32, weights: Float32) -> Float64:
    """float64[2**15]: what the `weights` [V] of each of the `sizes` [V] are together. As `np.bincount`, which first
    makes both twice as wide."""
    mass = np.zeros(1 << 15)
    for index in range(len(weights)):
        mass[sizes[index]] += weights[index]
    return mass


@compiled
def truncate(weights: Weights, left: Left, cut: Cut, sure: Float64) -> float:
    """Write into `sure` [U] what is sure of each candidate's weight after truncation; the most that all else weighs."""
    status = np.where(weights.high > 0, _SURE, _OUT)
    others = left.outside > 0
    if cut.min_p > 0 or cut.top_k > 0 or cut.top_p < 1:
        order = _order(weights, left.largest if others else 0.0)
        if not len(order.head):
            status[status == _SURE] = _DOUBTFUL
        else:
            others = _apply_min_p(weights, left, order, cut.min_p, status) and others
            if cut.top_k > 0:
                top_k = float(cut.top_k)
                others = _cut_off(weights, order, True, top_k, top_k, status) < top_k and others
            if cut.top_p < 1:
                unsure = _fill_sure(weights, left, status, others, sure)
                least, most = cut.top_p * sure.sum(), cut.top_p * (sure.sum() + unsure)
                others = _cut_off(weights, order, False, least, most, status) < most and others
    return _fill_sure(weights, left, status, others, sure)


@compiled
def _order(weights: Weights, largest: float) -> _Order:
    """`largest`: what a token outside of the candidates can weigh."""
    known = weights.complete & (weights.low == weights.high)
    head = np.flatnonzero(known & (weights.low > largest))
    head = head[np.argsort(weights.ids[head])]
    loose = np.flatnonzero(~known & (weights.high > 0))
    return _Order(
        head[np.argsort(-weights.low[head], kind="mergesort")],
        loose[np.argsort(-weights.high[loose], kind="mergesort")],
    )


@compiled
def _apply_min_p(weights: Weights, left: Left, order: _Order, min_p: float, status: Int64) -> bool:
    """Leave out what min_p does; whether it leaves in tokens outside of the candidates."""
    best = weights.low[order.head[0]]
    most = max(best, weights.high[order.loose[0]]) if len(order.loose) else best
    for column in range(len(status)):
        if weights.high[column] < min_p * best:
            status[column] = _OUT
        elif status[column] == _SURE and weights.low[column] < min_p * most:
            status[column] = _DOUBTFUL
    return bool(left.largest >= min_p * best)


@compiled
def _cut_off(weights: Weights, order: _Order, counted: bool, least: float, most: float, status: Int64) -> float:
    """Leave out the tokens before which there is enough: `most` or more in weight, or where they are `counted` in
    number, surely is; where less than `least` can be, they surely stay. What surely is before all that is no head."""
    surely, possibly, at = 0.0, 0.0, 0
    in_head = np.zeros(len(status), np.bool_)
    for column in order.head:
        in_head[column] = True
        weight = weights.low[column]
        while at < len(order.loose) and weights.high[order.loose[at]] >= weight:
            possibly += _drop_or_doubt(weights, order.loose[at], counted, surely >= most, status)
            at += 1
        if status[column] == _OUT:
            continue
        amount = 1.0 if counted else weight
        surely_before = surely
        surely += amount if status[column] == _SURE else 0.0
        if surely_before >= most:
            status[column] = _OUT
        elif possibly >= least:
            status[column] = _DOUBTFUL
        possibly += amount
    for place in range(at, len(order.loose)):
        _drop_or_doubt(weights, order.loose[place], counted, surely >= most, status)
        in_head[order.loose[place]] = True
    in_head[order.loose] = True
    for column in range(len(status)):
        if not in_head[column] and status[column] != _OUT:
            status[column] = _OUT if surely >= most else _DOUBTFUL
    return surely


@compiled
def _drop_or_doubt(weights: Weights, column: int, counted: bool, drop: bool, status: Int64) -> float:
    """Leave a candidate that is not known out, or in doubt; what it can be, in weight or number, if it is left in."""
    if status[column] == _OUT:
        return 0.0
    status[column] = _OUT if drop else _DOUBTFUL
    return 1.0 if counted else weights.high[column]


@compiled
def _fill_sure(weights: Weights, left: Left, status: Int64, others: bool, sure: Float64) -> float:
    """As `truncate`, once it is known what is left in. `others`: tokens outside of the candidates too."""
    known, partly, held_back = 0.0, 0.0, 0.0
    for column in range(len(status)):
        low, high = weights.low[column], weights.high[column]
        sure[column] = low if status[column] == _SURE else 0.0
        if status[column] != _OUT:
            if weights.complete[column]:
                known += high - sure[column]
            else:
                partly += high - sure[column]
                held_back += low - sure[column]
    return known + min(partly + (left.outside if others else 0.0), left.jointly + held_back)
