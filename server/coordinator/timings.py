"""When what happened to the sequences of traced requests, up to their first token. Nothing is kept of the others."""

from __future__ import annotations

import time
from collections.abc import Iterable

from server.request import SequenceRequest
from server.wire.api import SequenceTiming


class Timings:
    """By sequence number. Moments are seconds on the clock of `time.perf_counter`, which all processes of a machine
    share. Falsy while nothing is timed."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._timings: dict[int, SequenceTiming] = {}

    def __bool__(self) -> bool:
        return bool(self._timings)

    def queued(self, requests: Iterable[SequenceRequest]) -> None:
        now = time.perf_counter()
        self._timings |= {
            request.id: SequenceTiming(now, [0.0] * self._experts) for request in requests if request.timed
        }

    def admitted(self, sequence: int) -> None:
        """It has a slot."""
        if (timing := self._timings.get(sequence)) is not None:
            timing.admitted = time.perf_counter()

    def reported(self, expert: int, sequences: Iterable[int], when: float) -> None:
        """An expert has shown its distribution after these sequences' prompts."""
        for sequence in sequences:
            timing = self._timings.get(sequence)
            if timing is not None and not timing.prefilled[expert]:
                timing.prefilled[expert] = when

    def take(self, sequences: Iterable[int]) -> dict[int, SequenceTiming]:
        """The timings of those of `sequences` that are timed; they have their first token now."""
        now = time.perf_counter()
        taken = {sequence: self._timings.pop(sequence) for sequence in sequences if sequence in self._timings}
        for timing in taken.values():
            timing.first_token = now
        return taken

    def forget(self, sequence: int) -> None:
        self._timings.pop(sequence, None)
