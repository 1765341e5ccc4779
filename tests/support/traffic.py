"""Random traffic on a deployment: sequences that come when they like, some of which are cancelled half-way."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from server.launch.local import Generated, LocalDeployment
from server.request import SequenceRequest
from server.wire.api import Ended, Progress
from server.wire.stats import Stats


@dataclass(frozen=True)
class Visit:
    """A sequence, when it comes (seconds from the start), and after how many of its tokens it is cancelled, if ever.
    0: right after it came."""

    request: SequenceRequest
    at: float
    cancelled_after: int | None


@dataclass
class Outcome:
    """`finished` and `cancelled` by sequence number; `after_end`: messages about sequences that had already ended."""

    finished: dict[int, Generated] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    after_end: list[str] = field(default_factory=list)


def visits(requests: list[SequenceRequest], *, seconds: float, cancelled: float, chance: random.Random) -> list[Visit]:
    """`requests` at random times within `seconds`, a part `cancelled` of them cut short at a random token."""
    made = [
        Visit(
            request,
            chance.uniform(0, seconds),
            chance.randrange(request.max_tokens) if chance.random() < cancelled else None,
        )
        for request in requests
    ]
    return sorted(made, key=lambda visit: visit.at)


def run(deployment: LocalDeployment, coming: list[Visit], *, limit: float) -> Outcome:
    """Play `coming`. Raises TimeoutError if something has not ended after `limit` seconds."""
    return _Player(deployment, coming).play(limit)


class _Player:
    def __init__(self, deployment: LocalDeployment, coming: list[Visit]) -> None:
        self._deployment = deployment
        self._coming = list(coming)
        self._visits = {visit.request.id: visit for visit in coming}
        self._open: dict[int, Generated] = {}
        self._outcome = Outcome()

    def play(self, limit: float) -> Outcome:
        started = time.monotonic()
        while self._coming or self._open:
            now = time.monotonic() - started
            if now > limit:
                raise TimeoutError(f"{len(self._open)} sequences had not ended after {limit:g} s: {self._describe()}")
            self._start_due(now)
            pause = max(0.0, self._coming[0].at - now) if self._coming else 1.0
            self._take(self._deployment.receive(min(pause, 1.0)))
        return self._outcome

    def _start_due(self, now: float) -> None:
        due = [visit for visit in self._coming if visit.at <= now]
        if not due:
            return
        del self._coming[: len(due)]
        self._open |= {visit.request.id: Generated() for visit in due}
        self._deployment.submit([visit.request for visit in due])
        for visit in due:
            if visit.cancelled_after == 0:
                self._cancel(visit.request.id)

    def _take(self, message: object) -> None:
        match message:
            case Progress(sequences=sequences, tokens=tokens):
                for sequence, token in zip(sequences, tokens, strict=True):
                    self._take_token(sequence, token)
            case Ended(sequence=sequence) if sequence in self._open:
                self._open[sequence].ended = message
                self._outcome.finished[sequence] = self._open.pop(sequence)
            case Ended(sequence=sequence) if sequence not in self._outcome.cancelled:
                self._outcome.after_end.append(f"{sequence} ended twice")

    def _take_token(self, sequence: int, token: int) -> None:
        if (generated := self._open.get(sequence)) is None:
            if sequence not in self._outcome.cancelled:
                self._outcome.after_end.append(f"{sequence} went on after its end")
            return
        generated.tokens.append(token)
        if len(generated.tokens) == self._visits[sequence].cancelled_after:
            self._cancel(sequence)

    def _cancel(self, sequence: int) -> None:
        self._deployment.abort([sequence])
        self._outcome.cancelled.add(sequence)
        del self._open[sequence]

    def _describe(self) -> str:
        return ", ".join(f"{sequence}: {len(done.tokens)} tokens" for sequence, done in sorted(self._open.items())[:10])


def settled(deployment: LocalDeployment, *, limit: float = 10.0) -> Stats:
    """The statistics once nothing runs, waits or holds KV cache anywhere, or the last ones after `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        stats = deployment.stats()
        idle = stats.running == stats.queued == 0
        if (idle and all(e.kv_used == 0 == e.running for e in stats.experts)) or time.monotonic() > deadline:
            return stats
        deployment.receive(0.05)  # engines say that they are empty a moment after the last token
