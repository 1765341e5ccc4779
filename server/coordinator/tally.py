"""What is counted of every fused token, in one compiled pass while the engines already compute the next step.

A fused token is one for which at least two experts had a usable row. Letters: B rows, E experts, K top-k, U candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64
from server.coordinator.bounds import VERDICTS, Bounds, verdict
from server.coordinator.compiled import compiled
from server.coordinator.fuser import Fused
from server.wire.stats import FusionStats, Histogram

SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))
NATS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)

_TOKENS, _DISAGREEMENTS, _VERDICTS = 0, 1, 2
"""Places in the array of totals; the verdicts are the last ones."""


class Counted(NamedTuple):
    """What is looked at of B tokens."""

    tops: Int32
    """[B, E]: each expert's most probable token, -1 where it is not available."""

    available: Bool
    """[B, E]: whose rows were usable."""

    coefficients: Float32
    """[B, E]: what they were fused with."""

    candidates: Int32
    """[B, U]: ids of what the lists hold."""

    bounds: Bounds
    """What the lists say of the scores."""


class _Shares(NamedTuple):
    """Cumulative counts of the shares |c_i| / sum_j |c_j|."""

    counts: Int64
    """[E, bins of SHARES]: how often an expert had such a share."""

    sums: Float64
    """[E]: of its shares."""

    decisive: Int64
    """[E]: how often its share was larger than any other's."""

    entropy_bounds: Float64
    """NATS."""

    entropy_counts: Int64
    """[bins of NATS]: how often the shares had such an entropy."""

    entropy_sum: Float64
    """[1]: of the entropies."""


class TokenTally:
    """Cumulative counts over fused tokens."""

    def __init__(self, experts: int) -> None:
        self._shares = _Shares(
            counts=np.zeros((experts, len(SHARES) + 1), np.int64),
            sums=np.zeros(experts, np.float64),
            decisive=np.zeros(experts, np.int64),
            entropy_bounds=np.array(NATS),
            entropy_counts=np.zeros(len(NATS) + 1, np.int64),
            entropy_sum=np.zeros(1, np.float64),
        )
        self._totals = np.zeros(_VERDICTS + len(VERDICTS), np.int64)

    def count(self, fused: Fused) -> None:
        """Count B tokens."""
        counted = Counted(fused.ids[:, :, 0], fused.available, fused.rule.coefficients, fused.table.ids, fused.bounds)
        _count(counted, self._shares, self._totals)

    def shares(self, expert: int) -> Histogram:
        """An expert's shares |c_i| / sum_j |c_j|."""
        return Histogram(list(SHARES), self._shares.counts[expert].tolist(), float(self._shares.sums[expert]))

    def decisive(self, expert: int) -> int:
        """Tokens for which its share was larger than any other's."""
        return int(self._shares.decisive[expert])

    def snapshot(self) -> FusionStats:
        return FusionStats(
            tokens=int(self._totals[_TOKENS]),
            disagreements=int(self._totals[_DISAGREEMENTS]),
            certificates=dict(zip(VERDICTS, self._totals[_VERDICTS:].tolist(), strict=True)),
            entropy=Histogram(list(NATS), self._shares.entropy_counts.tolist(), float(self._shares.entropy_sum[0])),
        )


@compiled
def _count(counted: Counted, shares: _Shares, totals: Int64) -> None:
    """One call for both: crossing into compiled code costs more than counting a few rows."""
    _count_shares(counted.available, counted.coefficients, shares)
    _count_choices(counted, totals)


@compiled
def _count_shares(available: Bool, coefficients: Float32, shares: _Shares) -> None:
    """Count the shares and the entropies of `coefficients` [B, E]."""
    for row in range(len(coefficients)):
        total = np.abs(coefficients[row]).sum()
        if available[row].sum() < 2 or not total > 0:
            continue
        entropy, largest, leader = 0.0, 0.0, -1
        for expert in range(coefficients.shape[1]):
            share = abs(coefficients[row, expert]) / total
            shares.counts[expert, max(0, int(np.ceil(share * 20 - 1e-5)) - 1)] += 1
            shares.sums[expert] += share
            if share > 0:
                entropy -= share * np.log(share)
            if share == largest:
                leader = -1
            elif share > largest:
                largest, leader = share, expert
        if leader >= 0:
            shares.decisive[leader] += 1
        shares.entropy_counts[np.searchsorted(shares.entropy_bounds, entropy)] += 1
        shares.entropy_sum[0] += entropy


@compiled
def _count_choices(counted: Counted, totals: Int64) -> None:
    """Count in `totals` the fused tokens, those on which the experts differed, and each certificate."""
    for row in range(len(counted.tops)):
        usable, first, differ = 0, -1, False
        for expert in range(counted.tops.shape[1]):
            if counted.available[row, expert]:
                usable += 1
                differ |= first >= 0 and first != counted.tops[row, expert]
                first = counted.tops[row, expert]
        if usable < 2:
            continue
        totals[_TOKENS] += 1
        totals[_DISAGREEMENTS] += differ
        totals[_VERDICTS + verdict(counted.candidates[row], counted.bounds, row)] += 1
