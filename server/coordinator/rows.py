"""The experts' rows: as they are reported, as the table keeps them, and when a sequence has all it waits for.

Letters: B rows of a report, S slots, E experts, K top-k, X exact ids, d projected size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.compiled import compiled
from server.wire.expert import Report


class ExpertRows(NamedTuple):
    """One expert's report of B rows, as arrays."""

    slots: Int32
    """[B]: whose rows they are."""

    positions: Int32
    """[B]: how many tokens the engine has seen of each sequence."""

    ids: Int32
    """[B, K]: its most probable tokens, best first."""

    logprobs: Float32
    """[B, K]: of `ids`."""

    exact: Float32
    """[B, X']: of the sequences' exact ids, as many as the longest of them has."""

    entropies: Float32
    """[B]: of the rows, in nats; [0] where no sequence asked."""

    projected: Float32
    """[B, d]: what the gate's projection made of the hidden states; [B, 0] without."""

    @classmethod
    def of(cls, report: Report) -> ExpertRows:
        """The arrays in `report`."""
        slots = np.frombuffer(report.slots, np.int32)
        return cls(
            slots,
            np.frombuffer(report.positions, np.int32),
            np.frombuffer(report.ids, np.int32).reshape(len(slots), -1),
            np.frombuffer(report.logprobs, np.float32).reshape(len(slots), -1),
            np.frombuffer(report.exact, np.float32).reshape(len(slots), -1),
            np.frombuffer(report.entropies, np.float32),
            np.frombuffer(report.projected, np.float32).reshape(len(slots), -1),
        )


class KeptRows(NamedTuple):
    """What each expert last reported of each sequence. Empty (-1, -inf, 0) where it is not expected, or gave a row that
    is NaN or -inf throughout."""

    ids: Int32
    """[S, E, K]: the most probable tokens, best first."""

    logprobs: Float32
    """[S, E, K]: of `ids`."""

    exact: Float32
    """[S, E, X]: of the sequence's exact ids."""

    entropies: Float32
    """[S, E]: of the row, in nats, for sequences whose policy asks."""

    projected: Float32
    """[S, E, d]: the gate's projections of the hidden state."""

    reported: Bool
    """[S, E]: the row is for the sequence's current position."""

    usable: Bool
    """[S, E]: the last row that the expert reported was not empty."""


class Lengths(NamedTuple):
    """Numbers of tokens."""

    prompt: Int32
    """[S, E]: of each expert's prompt."""

    generated: Int32
    """[S]: so far, given ones included."""

    given: Int32
    """[S]: that are given rather than sampled."""

    min_tokens: Int32
    """[S]: generated before a stop token may be sampled."""

    max_tokens: Int32
    """[S]: generated at most."""


@compiled
def keep_rows(expert: int, rows: ExpertRows, placed: Bool, lengths: Lengths, kept: KeptRows) -> tuple[Int64, Int64]:
    """Write an expert's rows for the current positions into `kept`: (slots of these, slots reported at another)."""
    at, elsewhere = np.empty((2, len(rows.slots)), np.int64)
    found = misplaced = 0
    for row in range(len(rows.slots)):
        slot = rows.slots[row]
        if not placed[slot, expert]:
            continue
        if rows.positions[row] != lengths.prompt[slot, expert] + lengths.generated[slot]:
            elsewhere[misplaced] = slot
            misplaced += 1
            continue
        at[found] = slot
        found += 1
        kept.reported[slot, expert] = True
        kept.usable[slot, expert] = _usable(rows.logprobs[row])
        if kept.usable[slot, expert]:
            kept.ids[slot, expert, : rows.ids.shape[1]] = rows.ids[row]
            kept.logprobs[slot, expert, : rows.ids.shape[1]] = rows.logprobs[row]
            kept.exact[slot, expert, : rows.exact.shape[1]] = rows.exact[row]
            kept.entropies[slot, expert] = rows.entropies[row] if len(rows.entropies) else np.float32(0)
            kept.projected[slot, expert, : rows.projected.shape[1]] = rows.projected[row]
        else:
            kept.ids[slot, expert], kept.logprobs[slot, expert], kept.exact[slot, expert] = -1, -np.inf, -np.inf
            kept.projected[slot, expert] = 0
    return at[:found], elsewhere[:misplaced]


@compiled
def _usable(logprobs: Float32) -> bool:
    """Whether a list of log-probabilities [K], best first, is neither NaN anywhere nor -inf throughout."""
    return len(logprobs) > 0 and logprobs[0] > -np.inf and not np.isnan(logprobs).any()


@compiled
def complete(active: Bool, expected: Bool, reported: Bool, needs_scores: Bool, scored: Bool) -> Int64:
    """Slots whose every expected expert has reported, and been scored where that is needed."""
    slots = np.empty(len(active), np.int64)
    count = 0
    for slot in range(len(active)):
        if not active[slot]:
            continue
        awaited = ready = 0
        for expert in range(expected.shape[1]):
            if expected[slot, expert]:
                awaited += 1
                ready += reported[slot, expert] and (scored[slot, expert] or not needs_scores[slot])
        if awaited and ready == awaited:
            slots[count] = slot
            count += 1
    return slots[:count]
