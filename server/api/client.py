"""The api's end of the conversation with the coordinator: numbers sequences, submits and aborts them, and
brings every request its own events. Knows token ids, not text and not HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.errors import BadRequest, GenerationFailed, Overloaded, RequestError
from server.request import FinishReason, SequenceRequest
from server.wire.api import (
    Abort,
    Ended,
    FromApi,
    GetStats,
    Progress,
    SequenceTiming,
    Status,
    Submit,
    ToApi,
    TokenDetails,
)
from server.wire.base import Stop
from server.wire.stats import Stats

_MAX_WAITING = 16_384
"""Events that may wait for a request whose client reads slowly."""
_RETRY_SECONDS = 5


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Comes before the first token."""

    count: int
    """Prompt tokens that every expert found in its prefix cache."""


Event = tuple[int, int | CachedTokens | Ended, TokenDetails | None]
"""(place of the sequence in its request, a token or its end, what was asked for beside the token)."""


class Link(Protocol):
    """The channel to the coordinator (`server.wire.async_channel.AsyncChannel`)."""

    async def send(self, message: FromApi) -> None: ...

    async def receive(self) -> ToApi: ...


class Generation:
    """The running sequences of one request. Leaving the `with` block aborts those that have not ended."""

    def __init__(self, client: EngineClient, numbers: Sequence[int]) -> None:
        self._client = client
        self._live = dict(enumerate(numbers))
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None
        self._nudged = False
        self._error: Exception | None = None
        self.timings: dict[int, SequenceTiming] = {}
        """Place of the sequence in the request -> when what happened to it, of those that are timed."""
        self.ended_at: dict[int, float] = {}
        """The same -> when it ended, on the same clock."""

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort(*self._live)

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to read, now or later."""
        return bool(self._live or self._events or self._error)

    async def read(self) -> list[Event]:
        """What has arrived, in order; waits for something. Empty after a `nudge`. Raises what `fail` was
        given."""
        while not self._events and not self._nudged and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error
        events, self._events = self._events, []
        self._nudged = False
        return events

    def abort(self, *places: int) -> None:
        """Stop these sequences, in one message."""
        if numbers := [self._live.pop(place) for place in places if place in self._live]:
            self._client.abort(numbers)

    def put(self, place: int, token: int, details: TokenDetails | None) -> None:
        if len(self._events) >= _MAX_WAITING:
            self.fail(GenerationFailed("the client reads too slowly"))
            return
        self._events.append((place, token, details))
        self._wake()

    def note_cached(self, place: int, tokens: int) -> None:
        """No reader is woken: the first token follows."""
        self._events.append((place, CachedTokens(tokens), None))

    def end(self, place: int, ended: Ended) -> None:
        del self._live[place]
        if place in self.timings:
            self.ended_at[place] = time.perf_counter()
        if ended.reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.fail(_failure(ended))
            return
        self._events.append((place, ended, None))
        self._wake()

    def fail(self, error: Exception) -> None:
        """End everything; the reader gets `error`."""
        self._error = self._error or error
        self.abort(*self._live)
        self._wake()

    def nudge(self) -> None:
        """Let a waiting reader return with nothing."""
        self._nudged = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One per process. `run` must be running for anything to arrive."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = itertools.count(time.time_ns() // 1000)  # a restarted api must not repeat its predecessor's
        self._running: dict[int, tuple[Generation, int]] = {}
        self._outbox: asyncio.Queue[FromApi] = asyncio.Queue()
        self._stats: Stats | None = None
        self._stats_at = 0.0
        self._stats_waiters: set[asyncio.Future[None]] = set()
        self.status: Status | None = None

    def number(self) -> int:
        """A sequence number that was never used before."""
        return next(self._numbers)

    @property
    def ready(self) -> bool:
        return self.status is not None and self.status.ready and not self.status.draining

    def require_ready(self) -> None:
        """Raises Overloaded while new requests are not accepted."""
        if self.ready:
            return
        draining = self.status is not None and self.status.draining
        why = "the server is shutting down" if draining else "the server is not ready"
        raise Overloaded(why, retry_after=_RETRY_SECONDS)

    def start(self, sequences: list[SequenceRequest]) -> Generation:
        """Submit the sequences of one request. Raises Overloaded while not ready."""
        self.require_ready()
        generation = Generation(self, [sequence.id for sequence in sequences])
        self._running.update({sequence.id: (generation, place) for place, sequence in enumerate(sequences)})
        self._outbox.put_nowait(Submit(sequences))
        return generation

    def abort(self, numbers: list[int]) -> None:
        """Stop these sequences and expect nothing more of them."""
        for number in numbers:
            self._running.pop(number, None)
        self._outbox.put_nowait(Abort(numbers))

    @property
    def stats_age(self) -> float:
        """Seconds since the last snapshot came."""
        return time.monotonic() - self._stats_at

    async def stats(self, limit: float) -> Stats | None:
        """A fresh snapshot, or the last one (None: there is none) if none comes within `limit` seconds."""
        waiter = asyncio.get_running_loop().create_future()
        if not self._stats_waiters:
            self._outbox.put_nowait(GetStats())
        self._stats_waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, limit)
        except TimeoutError:
            pass
        finally:
            self._stats_waiters.discard(waiter)
        return self._stats

    async def run(self) -> None:
        """Carry messages both ways until the coordinator says `Stop`; then nothing runs any more."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            self._end_all(Overloaded("the server is shutting down", retry_after=_RETRY_SECONDS))

    async def _read(self) -> None:
        while not isinstance(message := await self._link.receive(), Stop):
            self._dispatch(message)

    async def _write(self) -> None:
        while True:
            await self._link.send(await self._outbox.get())

    def _end_all(self, error: RequestError) -> None:
        self.status = Status(ready=False, draining=True, experts={})
        for generation in {generation for generation, _ in self._running.values()}:
            generation.fail(error)

    def _dispatch(self, message: ToApi) -> None:
        match message:
            case Progress():
                self._progress(message)
            case Ended():
                self._ended(message)
            case Status():
                self.status = message
            case Stats():
                self._stats, self._stats_at = message, time.monotonic()
                for waiter in self._stats_waiters:
                    if not waiter.done():
                        waiter.set_result(None)

    def _progress(self, message: Progress) -> None:
        running, details = self._running, message.details
        for number, token in zip(message.sequences, message.tokens, strict=True):
            if (found := running.get(number)) is not None:
                generation, place = found
                if number in message.cached_tokens:
                    generation.note_cached(place, message.cached_tokens[number])
                if number in message.timings:
                    generation.timings[place] = message.timings[number]
                generation.put(place, token, details.get(number))

    def _ended(self, message: Ended) -> None:
        if (found := self._running.pop(message.sequence, None)) is not None:
            generation, place = found
            generation.end(place, message)


def _failure(ended: Ended) -> RequestError:
    if ended.code == "invalid_grammar":
        return BadRequest(ended.message, code=ended.code)
    if ended.code == "too_long":
        return BadRequest(ended.message, code="context_length_exceeded")
    if ended.code == "overloaded":
        return Overloaded(ended.message or "the queue is full")
    return GenerationFailed(ended.message or "the answer could not be finished", code=ended.code or None)
