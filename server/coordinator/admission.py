"""Which waiting sequence may start: oldest first, while a slot is free and every engine it needs has KV cache for it.

The KV rule counts what running sequences hold now, not what they may grow to: an engine that runs full preempts its
youngest sequence, and alignment parks it. The watermark keeps that rare.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from server.request import SequenceRequest

_ARRIVALS = 1 << 40
"""More arrivals than a process sees: a sequence's order is priority * _ARRIVALS + arrival number."""


class WaitingQueue:
    """Sequences not yet started, by (priority, arrival)."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, SequenceRequest]] = []
        self._removed: set[int] = set()
        self._waiting: set[int] = set()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: SequenceRequest) -> None:
        self._arrivals += 1
        # The order is unique, so requests themselves are never compared.
        heapq.heappush(self._heap, (request.priority * _ARRIVALS + self._arrivals, request))
        self._waiting.add(request.id)

    def peek(self) -> tuple[int, SequenceRequest] | None:
        """(order, request) of the next to start."""
        while self._heap and self._heap[0][1].id in self._removed:
            self._removed.discard(heapq.heappop(self._heap)[1].id)
        return self._heap[0] if self._heap else None

    def pop(self) -> None:
        """Take out what `peek` showed."""
        self._waiting.discard(heapq.heappop(self._heap)[1].id)

    def remove(self, sequence: int) -> bool:
        """Whether the sequence was waiting; it no longer is."""
        if sequence not in self._waiting:
            return False
        self._waiting.discard(sequence)
        self._removed.add(sequence)
        return True

    def clear(self) -> Sequence[int]:
        """Empty the queue; the sequences that were in it."""
        gone = sorted(self._waiting)
        self._heap.clear()
        self._waiting.clear()
        self._removed.clear()
        return gone


def fits(needed: int, held: int, capacity: int, watermark: float) -> bool:
    """Whether `needed` KV tokens can be added to `held` in an engine of `capacity`; alone, anything that fits at all may."""
    return needed + held <= capacity * (1 - watermark) or (held == 0 and needed <= capacity)
