"""The tokens that count against sequences with a penalty.

Letters: S slots, P sequences with a penalty, B rows, U candidates, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from server.coordinator.arrays import Int32, Int64
from server.coordinator.sampling import SMALLEST, Penalties
from server.request import SequenceRequest


class PenaltyTable:
    """Token counts over the vocabulary, kept only for sequences with a penalty: P of them, int32[P, V]."""

    def __init__(self, slots: int, vocabulary: int) -> None:
        self._row = np.full(slots, -1, np.int64)
        self._free: list[int] = []
        self._parameters = np.zeros((0, 3), np.float32)  # presence, frequency, repetition
        self._output_counts = np.zeros((0, vocabulary), np.int32)
        self._in_prompt = np.zeros((0, vocabulary), bool)

    def start(self, slot: int, request: SequenceRequest) -> None:
        """Count for the sequence that starts in `slot`, if it has a penalty."""
        sampling = request.sampling
        parameters = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        if parameters == (0.0, 0.0, 1.0):
            return
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._row[slot] = row
        self._parameters[row] = np.maximum(parameters, (-np.inf, -np.inf, SMALLEST))
        self._output_counts[row] = 0
        self._in_prompt[row] = False
        for prompt in request.prompts:
            self._in_prompt[row, prompt] = True
        self._in_prompt[row, request.given] = True

    def stop(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        if self._row[slot] >= 0:
            self._free.append(int(self._row[slot]))
            self._row[slot] = -1

    def count(self, slots: Int64, tokens: Int32) -> None:
        """Count one generated token [B] for each of `slots` [B]."""
        rows = self._row[slots]
        counted = rows >= 0
        if counted.any():
            self._output_counts[rows[counted], tokens[counted]] += 1

    def look_up(self, slots: Int64, candidates: Int32) -> tuple[Int64, Penalties] | None:
        """(which of the rows have penalties, theirs), None if none has. `candidates` [B, U]."""
        rows = self._row[slots]
        having = np.flatnonzero(rows >= 0)
        if not having.size:
            return None
        rows, ids = rows[having], np.maximum(candidates[having], 0)
        counts = self._output_counts[rows[:, None], ids]
        seen = (counts > 0) | self._in_prompt[rows[:, None], ids]
        presence, frequency, repetition = self._parameters[rows].T
        return having, Penalties(presence, frequency, repetition, counts, seen)

    def of(self, slot: int) -> Penalties | None:
        """Those of one sequence [1], over the whole vocabulary; None if it has none."""
        if (row := int(self._row[slot])) < 0:
            return None
        rows = slice(row, row + 1)
        counts = self._output_counts[rows]
        presence, frequency, repetition = self._parameters[rows].T
        return Penalties(presence, frequency, repetition, counts, (counts > 0) | self._in_prompt[rows])

    def _grow(self) -> None:
        old = len(self._parameters)
        new = max(4, old)
        self._parameters = np.pad(self._parameters, ((0, new), (0, 0)))
        self._output_counts = np.pad(self._output_counts, ((0, new), (0, 0)))
        self._in_prompt = np.pad(self._in_prompt, ((0, new), (0, 0)))
        self._free.extend(range(old, old + new))
