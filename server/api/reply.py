"""Runs one request's generation and writes the answer: whole, or as server-sent events.

Ends the generation when the client leaves, when it stops reading for longer than the write limit, and when a
stop string is complete. Knows the events of the coordinator and ASGI, not the shapes of the answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.account import account_of
from server.api.answers import Answer, PromptScores
from server.api.client import Cached, EngineClient, Event, Generation
from server.api.faults import error_event
from server.api.protocol import GenerationRequest
from server.api.shapes import DONE, KEEP_ALIVE, Shape, Usage
from server.api.tracing import trace_of
from server.config import HttpConfig
from server.errors import GenerationFailed, RequestError
from server.messages import Ended
from server.metrics import ApiMetrics
from server.request import SequenceRequest

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

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
                if self._job.request.stream:
                    await self._stream(generation, _Writer(scope, send, generation, self._http))
                else:
                    await self._whole(generation, scope, receive, send)
            except RequestError as error:
                account.note_error(error)
                raise
            finally:
                watcher.cancel()
                account.usage = self._job.usage()
                account.finish_reasons = [answer.finish_reason for answer in self._job.answers if answer.finish_reason]
                if trace:
                    trace.generated(self._job.sequences, generation, self._text_seconds)

    async def _whole(self, generation: Generation, scope: Scope, receive: Receive, send: Send) -> None:
        timing = self._metrics.timing()
        readers: list[Answer | PromptScores] = [*self._job.answers, *self._job.scores]
        while generation.unfinished:
            events = await generation.read()
            timing.tokens(_token_places(events))
            started = time.perf_counter()
            _advance(generation, readers, events)
            self._text_seconds += time.perf_counter() - started
        body = self._job.shape.response(self._job.answers, self._job.scores, self._job.usage())
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, generation: Generation, writer: _Writer) -> None:
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
    """Sends the bytes of an event stream; looks after pauses, in both directions."""

    def __init__(self, scope: Scope, send: Send, generation: Generation, http: HttpConfig) -> None:
        self.started = False
        self._send = send
        self._generation = generation
        self._keepalive = http.keepalive_seconds
        self._limit = http.write_seconds
        self._abort: Callable[[], None] | None = scope.get("extensions", {}).get("polylogit.abort", {}).get("call")
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._sending = False
        self._period = min(1.0, self._keepalive / 2, self._limit / 2)
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
        pause = self._loop.time() - self._since
        if self._sending and pause > self._limit:
            if self._abort is not None:
                self._abort()
            self._generation.fail(ClientGone())
            return
        if not self._sending and pause >= self._keepalive:
            self._generation.nudge()
        self._timer = self._loop.call_later(self._period, self._check)


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
