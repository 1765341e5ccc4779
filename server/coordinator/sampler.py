"""From fused distributions to tokens: where the pure arithmetic of `sampling` meets the sequence table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.coordinator.arrays import Float32, Int32, Int64
from server.coordinator.fuser import Fused
from server.coordinator.sampling import choose, penalise, uniforms
from server.coordinator.table import SequenceTable
from server.wire.api import Recorded, TokenDetails


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one tick, and what must outlive the slots, which a sequence that ends gives up before its token is
    sent. Letters: B rows, U candidates."""

    fused: Fused
    """What they were sampled from."""

    columns: Int64
    """[B]: where each token stands among the candidates."""

    tokens: Int32
    """[B]: the tokens."""

    sequences: Int64
    """[B]: whose they are."""

    detailed: list[tuple[int, int]]
    """(row, alternatives wanted) of those who asked for more than the token."""

    cached: dict[int, int]
    """sequence -> prompt tokens found in every prefix cache, of those whose first token this is."""

    record: Recorded | None
    """What the experts showed, of those who asked."""

    def details(self, row: int, count: int) -> TokenDetails:
        """A token's log-probability and rank, the `count` best alternatives, and the coefficients."""
        logprobs, ids = self.fused.logprobs[row], self.fused.ids[row]
        sampled = logprobs[self.columns[row]]
        best = np.argsort(-logprobs, kind="stable")[:count]
        top = [(int(ids[column]), float(logprobs[column])) for column in best if np.isfinite(logprobs[column])]
        rank = 1 + int((logprobs > sampled).sum())
        return TokenDetails(float(sampled), rank, top, self.fused.coefficients[row].tolist())


def sample(table: SequenceTable, fused: Fused) -> Sampled:
    """One token for each row, or the given one where there is one."""
    slots = fused.slots
    positions = table.lengths.generated[slots]
    numbers = uniforms(table.seeds[slots], np.maximum(positions - table.lengths.given[slots], 0))
    columns = choose(fused.ids, _adjusted_scores(table, fused), table.rules.of(slots), numbers)
    if ((forced := table.forced[slots]) >= 0).any():
        columns = np.where(forced >= 0, (fused.ids == forced[:, None]).argmax(axis=1), columns)
    sequences = table.sequence[slots]
    return Sampled(
        fused=fused,
        columns=columns,
        tokens=np.maximum(fused.ids[np.arange(len(slots)), columns], 0),
        sequences=sequences,
        detailed=[(int(row), int(table.top_logprobs[slots[row]])) for row in np.flatnonzero(table.detailed[slots])],
        cached={int(sequences[row]): table.cached_tokens(slots[row]) for row in np.flatnonzero(positions == 0)},
        record=_record(table, fused, sequences, columns),
    )


def _adjusted_scores(table: SequenceTable, fused: Fused) -> Float32:
    """Fused log-probabilities after bias, min_tokens and penalties: float32[B, U]."""
    slots, exact, lengths, scores = fused.slots, table.exact, table.lengths, fused.logprobs
    if (bias := exact.bias[slots]).any():
        shift = np.zeros_like(scores)
        np.put_along_axis(shift, fused.exact_columns, bias, 1)
        scores = scores + shift
    early = np.asarray(lengths.generated[slots] < lengths.min_tokens[slots])
    if early.any():
        stops = np.zeros(scores.shape, bool)
        np.put_along_axis(stops, fused.exact_columns, exact.is_stop[slots], 1)
        held = np.where(stops & early[:, None], np.float32(-np.inf), scores)
        # With nothing else to sample, a stop token is sampled all the same.
        scores = np.where(np.isfinite(held).any(axis=1, keepdims=True), held, scores)
    if (found := table.penalties(slots, fused.ids)) is not None:
        rows, penalties = found
        scores = scores.copy()
        scores[rows] = penalise(scores[rows], penalties)
    return scores


def _record(table: SequenceTable, fused: Fused, sequences: Int64, columns: Int64) -> Recorded | None:
    """What the experts showed for the sequences that asked; those that get no token are left out."""
    recorded = table.recorded[fused.slots]
    if not recorded.any():
        return None
    rows = np.flatnonzero(recorded & ~fused.lost)
    return Recorded(
        sequences[rows].tolist(),
        fused.sources.ids[rows, :, : fused.read].tobytes(),
        fused.sources.logprobs[rows, :, : fused.read].tobytes(),
        table.rows.projected[fused.slots[rows]].tobytes(),
        token_logprobs=fused.table.logprobs[rows, :, columns[rows]].tobytes(),
        log_normaliser=np.array(
            [_log_normaliser(table, fused, row, columns[row]) for row in rows], np.float32
        ).tobytes(),
    )


def _log_normaliser(table: SequenceTable, fused: Fused, row: int, column: int) -> float:
    """Of the scores of the candidates, at the temperature that a row samples at."""
    temperature = float(table.rules.temperature[fused.slots[row]]) or 1.0
    logprobs = fused.logprobs[row].astype(np.float64)
    weights, said = fused.coefficients[row], fused.table.logprobs[row, :, column]
    counts = weights != 0
    score = np.log(weights @ np.exp(said)) if fused.prob_space[row] else weights[counts] @ said[counts]
    moved = float(score - logprobs[column]) / temperature
    return float(np.log(np.exp(logprobs / temperature).sum()) + moved)
