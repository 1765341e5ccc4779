"""From fused distributions to tokens: where the pure arithmetic of `sampling` meets the sequence table.

First a draft, from what the experts' lists say; then, for rows whose token or log-probabilities they leave open, the
same from the whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from server.coordinator.arrays import Bool, Float32, Float64, Int32, Int64
from server.coordinator.bounds import reportable
from server.coordinator.fuser import Fused, WholeRow, hopeless
from server.coordinator.fusion import Room, log_sum
from server.coordinator.sampling import (
    Choice,
    Penalties,
    Scores,
    choose,
    choose_whole,
    penalise,
    uniforms,
)
from server.coordinator.table import SequenceTable
from server.wire.api import Recorded, TokenDetails


@dataclass(frozen=True, slots=True)
class Draft:
    """What the lists say of the tokens of B rows."""

    fused: Fused
    """What they are sampled from."""

    choice: Choice
    """The tokens that are sampled, as far as they are settled."""

    columns: Int64
    """[B]: where each token stands among the candidates, given ones too; -1 where it is not settled."""

    recorded: Bool
    """[B]: the experts' rows are asked for."""

    lost: Bool
    """[B]: no expert, or not one that is essential to the policy, gave a usable distribution."""

    unclear: Bool
    """[B]: the token is settled, but its log-probabilities are not."""

    @property
    def open(self) -> Int64:
        """The rows that must be known whole."""
        return np.flatnonzero(((self.columns < 0) | self.unclear) & ~self.lost)

    def only(self, rows: Bool) -> Draft:
        """That of the `rows` bool[B]."""
        return Draft(
            self.fused.only(rows),
            self.choice.only(rows),
            self.columns[rows],
            self.recorded[rows],
            self.lost[rows],
            self.unclear[rows],
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one tick, and what must outlive the slots, which a sequence that ends gives up before its token is
    sent. Letters: B rows, E experts, U candidates, V vocabulary."""

    draft: Draft
    """What they were sampled from."""

    whole: list[int]
    """Rows that had to be known whole."""

    logprobs: dict[int, Float32]
    """Row -> log-probabilities [V] of the fused distribution, of those of them who asked for more than the token."""

    tokens: Int32
    """[B]: the tokens."""

    lost: Bool
    """[B]: rows for which there was none to sample."""

    sequences: Int64
    """[B]: whose they are."""

    detailed: list[tuple[int, int]]
    """(row, alternatives wanted) of those who asked for more than the token."""

    cached: dict[int, int]
    """sequence -> prompt tokens found in every prefix cache, of those whose first token this is."""

    record: Recorded | None
    """What the experts showed, of those who asked."""

    @property
    def fused(self) -> Fused:
        return self.draft.fused

    def bounds(self) -> Float64:
        """[B]: how far the log of each row's normaliser may be from the middle of what the lists allow, in nats."""
        known = ~self.lost
        known[self.whole] = False
        found = np.zeros(len(known))
        np.subtract(self.fused.bounds.log_high, self.fused.bounds.log_low, out=found, where=known)
        return np.asarray(found[np.isfinite(found)] / 2)

    def details(self, row: int, count: int) -> TokenDetails:
        """A token's log-probability and rank, the `count` best alternatives, and the coefficients."""
        logprobs: Float32 | Float64
        ids: Int32 | None
        if row in self.logprobs:
            logprobs, ids, at = self.logprobs[row], None, int(self.tokens[row])
        else:
            logprobs, ids, at = _middle(self.fused, row), self.fused.table.ids[row], int(self.draft.columns[row])
        best = _largest(logprobs, count)
        tokens = best.tolist() if ids is None else ids[best].tolist()
        values = logprobs[best].tolist()
        top = [(token, value) for token, value in zip(tokens, values, strict=True) if np.isfinite(value)]
        rank = 1 + int((logprobs > logprobs[at]).sum())
        return TokenDetails(float(logprobs[at]), rank, top, self.fused.rule.coefficients[row].tolist())


def draft(table: SequenceTable, fused: Fused, tolerance: float) -> Draft:
    """One token for each row, or the given one where there is one, as far as the lists settle it; and whether its
    log-probabilities, where they are asked for, are known within `tolerance`."""
    slots, candidates, rules = fused.slots, fused.table, table.rules.of(fused.slots)
    choice = choose(candidates.ids, _adjusted(table, fused), fused.bounds, fused.rule, rules, _numbers(table, slots))
    columns = choice.columns
    if ((forced := table.forced[slots]) >= 0).any():
        columns = np.where(forced >= 0, (candidates.ids == forced[:, None]).argmax(axis=1), columns)
    wanted, recorded = table.top_logprobs[slots], table.recorded[slots]
    unclear = np.zeros(len(slots), bool)
    if (wanted >= 0).any() or recorded.any():
        unclear = ~reportable(candidates, fused.bounds, fused.rule, columns, wanted, tolerance)
        if recorded.any():
            unclear |= recorded & _unrecordable(table, fused, columns, tolerance)
    lost = hopeless(fused.bounds, fused.available, fused.rule.coefficients)
    return Draft(fused, choice, columns, recorded, lost, unclear)


def settle(table: SequenceTable, draft: Draft, whole: dict[int, WholeRow]) -> Sampled:
    """The tokens, with the `whole` rows of those that are open."""
    fused, slots = draft.fused, draft.fused.slots
    tokens = np.maximum(fused.table.ids[np.arange(len(slots)), draft.columns], 0)
    lost = draft.lost.copy()
    logprobs: dict[int, Float32] = {}
    records: dict[int, _RowRecord] = {}
    room = Room.of(table.vocabulary if whole else 0)
    for row, known in whole.items():
        settled = _settle_row(table, draft, row, known, room)
        tokens[row], lost[row] = settled.token, settled.lost
        if settled.logprobs is not None:
            logprobs[row] = settled.logprobs
        if settled.record is not None:
            records[row] = settled.record
    sequences = table.sequence[slots]
    first = np.flatnonzero(table.lengths.generated[slots] == 0)
    return Sampled(
        draft=draft,
        whole=[row for row in whole if not lost[row]],
        logprobs=logprobs,
        tokens=tokens,
        lost=lost,
        sequences=sequences,
        detailed=[(row, max(int(table.top_logprobs[slots[row]]), 0)) for row in _rows(table.detailed[slots] & ~lost)],
        cached={int(sequences[row]): table.cached_tokens(slots[row]) for row in first},
        record=_record(table, draft, records, np.flatnonzero(draft.recorded & ~lost)),
    )


def _numbers(table: SequenceTable, slots: Int64, *, again: bool = False) -> Float64:
    """A random number [B] for the current position of each sequence, or another one."""
    seeds = table.seeds[slots]
    places = np.maximum(table.lengths.generated[slots] - table.lengths.given[slots], 0)
    return uniforms(~seeds if again else seeds, places)


def _rows(which: Bool) -> list[int]:
    return [int(row) for row in np.flatnonzero(which)]


# --- from the lists ---


def _adjusted(table: SequenceTable, fused: Fused) -> Scores:
    """Bounds on the scores after bias, min_tokens and penalties."""
    slots, exact, columns, bounds = fused.slots, table.exact, fused.table.exact_columns, fused.bounds
    scores = Scores(bounds.lower, bounds.upper, bounds.highest, np.ones(len(slots), bool))
    if (bias := exact.bias[slots]).any():
        shift = np.zeros_like(bounds.lower)
        np.put_along_axis(shift, columns, bias, 1)
        scores = scores._replace(lower=scores.lower + shift, upper=scores.upper + shift)
    if (early := _early(table, slots)).any():
        stops = np.zeros(scores.lower.shape, bool)
        np.put_along_axis(stops, columns, exact.is_stop[slots], 1)
        held = stops & early[:, None]
        # With nothing else to sample, a stop token is sampled all the same.
        others = np.where(held, -np.inf, scores.upper).max(axis=1, initial=-np.inf)
        held &= (np.maximum(others, scores.highest) > -np.inf)[:, None]
        scores = scores._replace(
            lower=np.where(held, -np.inf, scores.lower), upper=np.where(held, -np.inf, scores.upper)
        )
    if (found := table.penalties(slots, fused.table.ids)) is not None:
        scores = _penalised(scores, fused, *found)
    return scores


def _early(table: SequenceTable, slots: Int64) -> Bool:
    """bool[B]: no stop token may be sampled yet."""
    return np.asarray(table.lengths.generated[slots] < table.lengths.min_tokens[slots])


def _penalised(scores: Scores, fused: Fused, rows: Int64, penalties: Penalties) -> Scores:
    """`scores` with the `penalties` of some `rows`. A repetition penalty needs normalised scores, so that their bounds
    follow from those of the normaliser; and where a penalty is a reward, what is outside of the candidates may gain."""
    lower, upper, highest = scores.lower.copy(), scores.upper.copy(), scores.highest.copy()
    plain = scores.plain.copy()
    repeats = penalties.repetition != 1
    low = np.where(repeats, fused.bounds.log_low[rows], 0.0)[:, None]
    high = np.where(repeats, fused.bounds.log_high[rows], 0.0)[:, None]
    least, most = lower[rows], upper[rows]
    lower[rows] = np.where(penalties.seen, np.minimum.reduce(_between(least, penalties, low, high)), least)
    upper[rows] = np.where(penalties.seen, np.maximum.reduce(_between(most, penalties, low, high)), most)
    rewards = (penalties.presence < 0) | (penalties.frequency < 0) | (penalties.repetition < 1)
    unknown = rewards | ~np.isfinite(low[:, 0]) | ~np.isfinite(high[:, 0])
    highest[rows] = np.where(unknown & (fused.bounds.unsettled.tokens[rows] > 0), np.inf, highest[rows])
    plain[rows] = ~repeats
    return Scores(lower, upper, highest, plain)


def _between(scores: Float64, penalties: Penalties, low: Float64, high: Float64) -> tuple[Float64, Float64, Float64]:
    """`scores` [B, U] after penalties with the one and the other log-normaliser [B, 1], and the extreme between them:
    the penalty changes its direction where a score is 0."""
    first, last = normalised(scores, penalties, low), normalised(scores, penalties, high)
    return first, last, np.where((scores > low) != (scores > high), scores, first)


def normalised(scores: Float64 | Float32, penalties: Penalties, log_normaliser: Float64) -> Float64:
    """`scores` [B, U], not normalised, after penalties on what they are once they are."""
    with np.errstate(invalid="ignore"):
        return np.asarray(penalise(scores - log_normaliser, penalties) + log_normaliser)


def _middle(fused: Fused, row: int) -> Float64:
    """Log-probabilities [U] of a row's candidates, in the middle of what the lists allow."""
    bounds = fused.bounds
    return np.asarray(bounds.lower[row] - (bounds.log_low[row] + bounds.log_high[row]) / 2)


def _unrecordable(table: SequenceTable, fused: Fused, columns: Int64, tolerance: float) -> Bool:
    """bool[B]: an expert did not list the token; or log-probabilities are asked for, and the normaliser at the
    sequence's own temperature is not known well enough."""
    listed = fused.table.listed[np.arange(len(columns)), :, columns]
    asked = table.top_logprobs[fused.slots] >= 0
    low, high = fused.bounds.log_normalisers(fused.rule, _powers(table, fused.slots))
    with np.errstate(invalid="ignore"):
        apart = high - low
    return (fused.available & ~listed).any(axis=1) | ~np.isfinite(apart) | (asked & ~(apart <= 2 * tolerance))


def _powers(table: SequenceTable, slots: Int64) -> Float64:
    """[B]: what scores are multiplied by where tokens are sampled; 1 for greedy ones."""
    temperatures = table.rules.temperature[slots].astype(np.float64)
    return np.where(temperatures > 0, 1 / np.where(temperatures > 0, temperatures, 1), 1.0)


# --- from whole rows ---


@dataclass(frozen=True, slots=True)
class _RowRecord:
    """What is recorded of a row that is known whole."""

    token_logprobs: Float32
    """[E]: as in `Recorded`."""

    log_normaliser: float
    """As in `Recorded`."""


@dataclass(frozen=True, slots=True)
class _Settled:
    """What comes of a row that is known whole."""

    token: int
    """The token."""

    lost: bool = False
    """There was none to sample."""

    logprobs: Float32 | None = None
    """[V]: of the fused distribution, where more than the token is asked for."""

    record: _RowRecord | None = None
    """Where it is asked for."""


def _settle_row(table: SequenceTable, draft: Draft, row: int, whole: WholeRow, room: Room) -> _Settled:
    """The token of a row that is known whole, or the one that it has; and what else is asked for."""
    slots = draft.fused.slots[row : row + 1]
    scores = whole.fuse(room)
    if scores.max() == -np.inf:
        return _Settled(0, lost=True)
    slot, column, logprobs, record = int(slots[0]), int(draft.columns[row]), None, None
    penalties = table.penalties_of(slot)
    log_normaliser = 0.0
    if table.detailed[slot] or penalties is not None:
        log_normaliser = log_sum(scores, room.scratch)
    if table.detailed[slot]:
        logprobs = scores - np.float32(log_normaliser)
    power = _powers(table, slots)[0]
    normaliser = log_sum(scores * np.float32(power), room.scratch) if draft.recorded[row] else 0.0
    if column >= 0:
        token = int(draft.fused.table.ids[row, column])
    else:
        _adjust_whole(table, slots, scores, penalties, log_normaliser)
        choice = draft.choice.row(row, draft.fused.table.ids[row])
        number = float(_numbers(table, slots, again=True)[0])
        token = choose_whole(scores, table.rules.of(slots).row(0), choice, number, room.scratch)
    if draft.recorded[row]:
        token_logprobs = np.full(draft.fused.available.shape[1], -np.inf, np.float32)
        for expert, values in whole.experts.items():
            token_logprobs[expert] = values[token]
        record = _RowRecord(token_logprobs, normaliser)
    return _Settled(token, logprobs=logprobs, record=record)


def _adjust_whole(
    table: SequenceTable, slots: Int64, scores: Float32, penalties: Penalties | None, log_normaliser: float
) -> None:
    """Apply bias, min_tokens and penalties, in place, to the scores [V] of one of `slots`."""
    slot, exact = int(slots[0]), table.exact
    ids = exact.ids[slot]
    scores[ids[ids >= 0]] += exact.bias[slot][ids >= 0]
    if _early(table, slots)[0]:
        stops = ids[exact.is_stop[slot]]
        values = scores[stops]
        scores[stops] = -np.inf
        if scores.max() == -np.inf:
            scores[stops] = values
    if penalties is not None:
        changed = normalised(scores[None], penalties, np.array([[log_normaliser]]))
        np.copyto(scores, changed[0], where=penalties.seen[0], casting="same_kind")


def _largest(logprobs: Float64 | Float32, count: int) -> Int64:
    """Where the `count` largest of `logprobs` [V] stand, best first, of equals the first."""
    values, places = torch.topk(torch.from_numpy(logprobs), min(count, len(logprobs)))
    return np.asarray(places.numpy()[np.lexsort((places.numpy(), -values.numpy()))])


# --- records ---


def _record(table: SequenceTable, draft: Draft, records: dict[int, _RowRecord], rows: Int64) -> Recorded | None:
    """What the experts showed for the `rows` that asked; `records`: of those that are known whole."""
    if not draft.recorded.any():
        return None
    fused = draft.fused
    token_logprobs = fused.table.logprobs[rows, :, draft.columns[rows]]
    low, high = fused.bounds.log_normalisers(fused.rule, _powers(table, fused.slots))
    with np.errstate(invalid="ignore"):
        normaliser = ((low + high) / 2)[rows]
    for index, row in enumerate(rows.tolist()):
        if (known := records.get(row)) is not None:
            token_logprobs[index], normaliser[index] = known.token_logprobs, known.log_normaliser
    return Recorded(
        table.sequence[fused.slots[rows]].tolist(),
        fused.ids[rows, :, : fused.read].tobytes(),
        fused.logprobs[rows, :, : fused.read].tobytes(),
        table.rows.projected[fused.slots[rows]].tobytes(),
        token_logprobs=token_logprobs.astype(np.float32).tobytes(),
        log_normaliser=normaliser.astype(np.float32).tobytes(),
    )
