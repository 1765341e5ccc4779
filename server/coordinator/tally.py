"""What is counted of every fused token, in one compiled pass while the engines already compute the next step.

A fused token is one for which at least two experts had a usable row. Letters: B rows, E experts, K top-k, U candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64
from server.coordinator.certificate import VERDICTS, certify
from server.coordinator.compiled import compiled
from server.coordinator.fusion import CandidateTable
from server.wire.stats import FusionStats, Histogram

SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))
NATS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)

_TOKENS, _DISAGREEMENTS, _VERDICTS = 0, 1, 2
"""Places in the array of totals; the verdicts are the last ones."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What B tokens were fused from.

    `ids` int32[B, E, K] and `logprobs` float32[B, E, K]: the experts' lists, best first; `available` bool[B, E]: whose
    rows were usable; `table`: the candidates before any look-up; `prob_space` bool[B].
    """

    ids: Int32
    logprobs: Float32
    available: Bool
    table: CandidateTable
    prob_space: Bool
    vocabulary: int


class TokenTally:
    """Cumulative counts over fused tokens."""

    def __init__(self, experts: int) -> None:
        self._share_counts = np.zeros((experts, len(SHARES) + 1), np.int64)
        self._share_sums = np.zeros(experts, np.float64)
        self._decisive = np.zeros(experts, np.int64)
        self._entropy_bounds = np.array(NATS)
        self._entropy_counts = np.zeros(len(NATS) + 1, np.int64)
        self._entropy_sum = np.zeros(1, np.float64)
        self._totals = np.zeros(_VERDICTS + len(VERDICTS), np.int64)

    def count(self, sources: Sources, coefficients: Float32) -> None:
        """Count B tokens fused with `coefficients` [B, E]."""
        table = sources.table
        _count_shares(
            sources.available,
            coefficients,
            self._share_counts,
            self._share_sums,
            self._decisive,
            self._entropy_bounds,
            self._entropy_counts,
            self._entropy_sum,
        )
        _count_choices(
            sources.ids,
            sources.logprobs,
            sources.available,
            table.ids,
            table.logprobs,
            table.listed,
            coefficients,
            sources.prob_space,
            sources.vocabulary,
            self._totals,
        )

    def shares(self, expert: int) -> Histogram:
        """An expert's shares |c_i| / sum_j |c_j|."""
        return Histogram(list(SHARES), self._share_counts[expert].tolist(), float(self._share_sums[expert]))

    def decisive(self, expert: int) -> int:
        """Tokens for which its share was larger than any other's."""
        return int(self._decisive[expert])

    def snapshot(self) -> FusionStats:
        return FusionStats(
            tokens=int(self._totals[_TOKENS]),
            disagreements=int(self._totals[_DISAGREEMENTS]),
            certificates=dict(zip(VERDICTS, self._totals[_VERDICTS:].tolist(), strict=True)),
            entropy=Histogram(list(NATS), self._entropy_counts.tolist(), float(self._entropy_sum[0])),
        )


@compiled
def _count_shares(
    available: Bool,
    coefficients: Float32,
    counts: Int64,
    sums: Float64,
    decisive: Int64,
    entropy_bounds: Float64,
    entropy_counts: Int64,
    entropy_sum: Float64,
) -> None:
    """Enter shares into histograms `counts` [E, bins] of width 1/20, `sums` [E], `decisive` [E], and their entropy."""
    for row in range(len(coefficients)):
        total = np.abs(coefficients[row]).sum()
        if available[row].sum() < 2 or not total > 0:
            continue
        entropy, largest, leader = 0.0, 0.0, -1
        for expert in range(coefficients.shape[1]):
            share = abs(coefficients[row, expert]) / total
            counts[expert, max(0, int(np.ceil(share * 20 - 1e-5)) - 1)] += 1
            sums[expert] += share
            if share > 0:
                entropy -= share * np.log(share)
            if share == largest:
                leader = -1
            elif share > largest:
                largest, leader = share, expert
        if leader >= 0:
            decisive[leader] += 1
        entropy_counts[np.searchsorted(entropy_bounds, entropy)] += 1
        entropy_sum[0] += entropy


@compiled
def _count_choices(
    ids: Int32,
    logprobs: Float32,
    available: Bool,
    candidates: Int32,
    values: Float32,
    listed: Bool,
    coefficients: Float32,
    prob_space: Bool,
    vocabulary: int,
    totals: Int64,
) -> None:
    """Enter into `totals` how many tokens were fused, in how many the experts differed, and each certificate."""
    last = ids.shape[2] - 1
    for row in range(len(ids)):
        usable, first, differ = 0, -1, False
        for expert in range(ids.shape[1]):
            if available[row, expert]:
                usable += 1
                differ |= first >= 0 and first != ids[row, expert, 0]
                first = ids[row, expert, 0]
        if usable < 2:
            continue
        totals[_TOKENS] += 1
        totals[_DISAGREEMENTS] += differ
        verdict = certify(
            ids[row, :, 0],
            listed[row],
            values[row],
            candidates[row],
            logprobs[row, :, last],
            coefficients[row],
            prob_space[row],
            vocabulary,
        )
        totals[_VERDICTS + verdict] += 1
