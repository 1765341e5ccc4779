"""Runs one request's generation and writes the answer: whole, in blocks, or as server-sent events.

Ends the generation when the client leaves, or no longer reads and so is cut off (`server.api.http.server`), and when a
stop string is complete. Knows the events of the coordinator and ASGI, not the shapes of the answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.client import Cached, EngineClient, Event, Generation
from server.api.completions.answers import Answer, PromptScores
from server.api.completions.shapes import DONE, KEEP_ALIVE, Part, Shape, Usage
from server.api.http.account import account_of
from server.api.http.faults import error_event
from server.api.protocol import GenerationRequest
from server.api.tracing import trace_of
from server.config import HttpConfig
from server.errors import GenerationFailed, RequestError
from server.metrics.api import ApiMetrics
from server.request import SequenceRequest
from server.wire.api import Ended

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_BLOCK = 64 * 1024
_TURN = 256
"""Events between which others get a turn."""

_log = logging.getLogger("polylogit.api")

Reader = TypeVar("Reader", Answer, Answer | PromptScores)


class ClientGone(Exception):
    """The client left or no longer reads: nothing can be sent, nothing is wrong."""


def bug() -> GenerationFailed:
    """Log the exception that is being handled; what the client may know of it."""
    _log.exception("failed")
    return GenerationFailed("an internal error; the request id finds it in the server's log")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated, and for whom. `answers[i]` belongs to `sequences[i]`; `n` of them to each prompt. The
    sequences after them belong to `scores`: one for each prompt, or none."""

    sequences: list[SequenceRequest]
    answers: list[Answer]
    scores: list[PromptScores]
    shape: Shape
    request: GenerationRequest
    model: str

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        firsts = self.answers[:: self.request.n]
        return Usage(
            prompt_tokens=sum(len(answer.prompt) for answer in firsts),
            completion_tokens=sum(answer.count for answer in self.answers),
            cached_tokens=sum(answer.cached_tokens for answer in firsts),
        )


class Reply(Response):
    """The response of a completion endpoint. Errors before the first byte are raised, later ones are events: a
    RequestError, and any other as a server error."""

    def __init__(self, job: Job, client: EngineClient, metrics: ApiMetrics, http: HttpConfig) -> None:
        super().__init__()
        self._job = job
        self._client = client
        self._metrics = metrics
        self._http = http
        self._text_seconds = 0.0  # spent on turning tokens into text and events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = self._account = account_of(scope)
        account.request, account.model = self._job.request, self._job.model
        trace = trace_of(scope)
        with self._client.start(trace.timed(self._job.sequences) if trace else self._job.sequences) as generation:
            watcher = asyncio.create_task(_watch(receive, generation))
            try:
                await (self._stream if self._job.request.stream else self._whole)(generation, send)
            except RequestError as error:
                account.note_error(error)
                raise
            finally:
                watcher.cancel()
                account.usage = self._job.usage()
                account.finish_reasons = [answer.finish_reason for answer in self._job.answers if answer.finish_reason]
                if trace:
                    trace.generated(self._job.sequences, generation, self._text_seconds)

    async def _whole(self, generation: Generation, send: Send) -> None:
        parts = await self._parts(generation)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % sum(map(len, parts)))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for block in _blocks(parts):
            await send({"type": "http.response.body", "body": block, "more_body": bool(block)})
            if generation.unfinished:  # there is only one thing left to hear: the client is gone
                await generation.read()

    async def _parts(self, generation: Generation) -> list[Part]:
        """The whole response, once all has been generated."""
        job, timing = self._job, self._metrics.timing()
        readers: list[Answer | PromptScores] = [*job.answers, *job.scores]
        while generation.unfinished:
            events = await generation.read()
            timing.tokens(_token_places(events))
            for start in range(0, len(events), _TURN):
                if start:
                    await asyncio.sleep(0)
                self._keep(generation, readers, events[start : start + _TURN])
        for reader in readers:
            job.shape.keep(reader)
        return job.shape.response(job.answers, job.scores, job.usage())

    def _keep(self, generation: Generation, readers: Sequence[Answer | PromptScores], events: Sequence[Event]) -> None:
        """Text is put together at the end; what is said of tokens is too much for then."""
        started = time.perf_counter()
        for reader in _advance(generation, readers, events):
            if self._job.shape.shows_tokens or isinstance(reader, PromptScores):
                self._job.shape.keep(reader)
        self._text_seconds += time.perf_counter() - started

    async def _stream(self, generation: Generation, send: Send) -> None:
        writer = _Writer(send, generation, self._http.keepalive_seconds)
        try:
            end = await self._events_but_the_last(generation, writer)
            await writer.write(end + DONE, last=True)
        finally:
            writer.close()

    async def _events_but_the_last(self, generation: Generation, writer: _Writer) -> bytes:
        """Write the stream up to its last event, and return that one."""
        try:
            await self._events(generation, writer)
            return self._job.shape.closing(self._job.usage())
        except ClientGone:
            raise
        except Exception as error:
            if not writer.started:
                raise
            fault = error if isinstance(error, RequestError) else bug()
            self._account.note_error(fault)
            return error_event(fault)

    async def _events(self, generation: Generation, writer: _Writer) -> None:
        shape, answers = self._job.shape, self._job.answers
        timing = self._metrics.timing()
        opened = False
        while generation.unfinished:
            events = await generation.read()
            if not events:
                await writer.write(KEEP_ALIVE)
                continue
            started = time.perf_counter()
            chunks = [shape.chunk(answer) for answer in _advance(generation, answers, events) if _speaks(answer, shape)]
            self._text_seconds += time.perf_counter() - started
            if not opened:
                chunks.insert(0, shape.opening(answers))
                opened = True
            timing.tokens(_token_places(events))
            if data := b"".join(chunks):
                await writer.write(data)


class _Writer:
    """Sends the bytes of an event stream; wakes the reader when there were none for a while."""

    def __init__(self, send: Send, generation: Generation, keepalive: float) -> None:
        self.started = False
        self._send = send
        self._generation = generation
        self._keepalive = keepalive
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._sending = False
        self._period = min(1.0, keepalive / 2)
        self._timer = self._loop.call_later(self._period, self._check)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        self._since = self._loop.time()
        self._sending = True
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self._sending = False

    def close(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if not self._sending and self._loop.time() - self._since >= self._keepalive:
            self._generation.nudge()
        self._timer = self._loop.call_later(self._period, self._check)


def _blocks(parts: list[Part]) -> Iterator[bytes]:
    """The same bytes, neither in many small writes nor in one that fills the memory until the client has read it; an
    empty block at the end."""
    block = bytearray()
    for part in parts:
        for start in range(0, len(part), _BLOCK):
            block += memoryview(part)[start : start + _BLOCK]
            if len(block) >= _BLOCK:
                yield bytes(block)
                block.clear()
    if block:
        yield bytes(block)
    yield b""


def _advance(generation: Generation, answers: Sequence[Reader], events: Sequence[Event]) -> list[Reader]:
    """Give each answer its events; those that gained something, in order of their first event."""
    gained: dict[int, Reader] = {}
    for place, item, choice in events:
        answer = answers[place]
        if answer.finish_reason is not None:
            continue
        if isinstance(item, Cached):
            answer.cached_tokens = item.tokens
            continue
        gained[place] = answer
        if isinstance(item, Ended):
            answer.end(item)
        elif answer.push(item, choice):
            generation.abort(place)
    return list(gained.values())


def _token_places(events: Sequence[Event]) -> list[int]:
    """The choice of each token among `events`."""
    return [place for place, item, _ in events if isinstance(item, int)]


def _speaks(answer: Answer, shape: Shape) -> bool:
    """Whether a chunk is due: the last text waits for the finish reason, and so comes with it."""
    if answer.finish_reason is not None:
        return True
    return not answer.settled and (answer.has_text or shape.shows_tokens)


async def _watch(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientGone())
