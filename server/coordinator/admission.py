"""Which waiting sequence may start: oldest first, while a slot is free and every engine it needs has KV cache for it.

The KV rule counts what running sequences hold now, not what they may grow to: an engine that runs full preempts its
youngest sequence, and alignment parks it. The watermark keeps that rare.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

import numpy as np

from server.config import Config
from server.coordinator.arrays import Bool
from server.coordinator.links import ExpertLink
from server.coordinator.observer import Observer
from server.coordinator.policy_book import PolicyBook
from server.coordinator.table import SequenceTable
from server.policy import Perplexity, essential, participants
from server.request import SequenceRequest

_ARRIVALS = 1 << 40
"""More arrivals than a process sees: a sequence's order is priority * _ARRIVALS + arrival number."""


class WaitingQueue:
    """Sequences not yet started, by (priority, arrival)."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, SequenceRequest]] = []
        self._waiting: dict[int, float] = {}  # sequence -> when it came
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: SequenceRequest) -> None:
        self._arrivals += 1
        # The order is unique, so requests themselves are never compared.
        heapq.heappush(self._heap, (request.priority * _ARRIVALS + self._arrivals, request))
        self._waiting[request.id] = time.perf_counter()

    def peek(self) -> tuple[int, SequenceRequest] | None:
        """(order, request) of the next to start."""
        while self._heap and self._heap[0][1].id not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def pop(self) -> float:
        """Take out what `peek` showed; how many seconds it has waited."""
        return time.perf_counter() - self._waiting.pop(heapq.heappop(self._heap)[1].id)

    def remove(self, sequence: int) -> bool:
        """Whether the sequence was waiting; it no longer is."""
        return self._waiting.pop(sequence, None) is not None

    def requests(self) -> list[SequenceRequest]:
        """What waits, in no order."""
        return [request for _, request in self._heap if request.id in self._waiting]

    def clear(self) -> Sequence[int]:
        """Empty the queue; the sequences that were in it."""
        gone = sorted(self._waiting)
        self._heap.clear()
        self._waiting.clear()
        return gone


class Admission:
    """Decides who enters the table."""

    def __init__(
        self,
        config: Config,
        links: list[ExpertLink],
        table: SequenceTable,
        policies: PolicyBook,
        observer: Observer,
    ) -> None:
        self._config = config
        self._names = config.expert_names
        self._links = links
        self._table = table
        self._policies = policies
        self._observer = observer
        self.waiting = WaitingQueue()

    def enqueue(self, requests: list[SequenceRequest]) -> tuple[str, str] | None:
        """Queue sequences, all or none; (message, code) if they are refused."""
        for request in requests:
            if problem := self._impossible(request):
                return problem, "too_long"
        free = self._config.limits.sequences - len(self._table.requests)
        if len(self.waiting) + len(requests) > self._config.limits.queue + free:
            return "the queue is full", "overloaded"
        for request in requests:
            self.waiting.push(request)
        return None

    def admit(self) -> None:
        """Start waiting sequences, oldest first, while there is room in every engine they need."""
        while not self._table.full and (head := self.waiting.peek()) is not None:
            order, request = head
            expected = self._expected(request)
            if not self._has_room(request, expected):
                return
            self._observer.admitted(request.id, self.waiting.pop())
            self._table.admit(
                request,
                order=order,
                policy=self._policies.acquire(request.policy),
                expected=expected,
                scores=isinstance(request.policy, Perplexity),
                max_tokens=min(request.max_tokens, self.context_left(request)),
            )

    def remove_impossible(self) -> list[int]:
        """Take out what waits and can no longer run."""
        gone = [request.id for request in self.waiting.requests() if self._impossible(request)]
        return [sequence for sequence in gone if self.waiting.remove(sequence)]

    def _participants(self, request: SequenceRequest) -> list[int]:
        """Indexes of the experts that `request` runs in."""
        return list(range(len(self._links))) if request.record else participants(request.policy, self._names)

    def _expected(self, request: SequenceRequest) -> Bool:
        """bool[E]: the experts that `request` will use. Where lost experts are done without, those that are up; a
        request that lacks an expert essential to its policy, or all, waits in the table, where it holds up nobody."""
        expected = np.zeros(len(self._links), bool)
        expected[self._participants(request)] = True
        up = expected & [link.up for link in self._links]
        led = all(up[self._names.index(name)] for name in essential(request.policy))
        return up if self._config.on_expert_loss == "degrade" and up.any() and led else expected

    def _has_room(self, request: SequenceRequest, expected: Bool) -> bool:
        """Whether the prompt fits beside what runs in every engine; with nothing running, anything possible does."""
        for link in self._links:
            if expected[link.index] and link.info is not None:
                held = self._table.kv_tokens(link.index, link.info.block_size)
                room = link.info.kv_tokens * (1 - self._config.limits.kv_watermark) - held
                if held and len(request.prompts[link.index]) + 1 > room:
                    return False
        return True

    def context_left(self, request: SequenceRequest) -> int:
        """How many tokens can follow the prompt in every engine: its context, and its KV cache if it were alone."""
        left = [
            min(link.info.max_model_len, link.info.kv_tokens) - len(request.prompts[link.index])
            for link in self._links
            if link.info is not None and request.prompts[link.index]
        ]
        return min(left, default=0)

    def _impossible(self, request: SequenceRequest) -> str | None:
        """Why this request can never run, or None."""
        if any(not request.prompts[index] for index in self._participants(request)):
            return "the prompt is empty"
        if self.context_left(request) < 1:
            return "the prompt is too long for an expert's context or KV cache"
        return None
