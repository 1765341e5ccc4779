"""Runs one request's generation and writes the response: at once, in blocks, or as server-sent events.

Ends the generation when the client leaves, or no longer reads and so is cut off (`server.api.http.server`), and when a
stop string is complete. Knows the events of the coordinator and ASGI, not how a response is encoded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.client import CachedTokens, EngineClient, Event, Generation
from server.api.completions.choices import ChoiceStream, PromptScores
from server.api.completions.encoder import ResponseEncoder
from server.api.completions.encoding import Encoded
from server.api.completions.event_stream import DONE, KEEP_ALIVE, EventStream
from server.api.completions.job import Job
from server.api.http.errors import ClientGone, error_event, internal_error
from server.api.summary import summary_of
from server.api.tracing import trace_of
from server.config import HttpConfig
from server.errors import RequestError
from server.metrics.api import ApiMetrics
from server.wire.api import Ended

_BLOCK = 64 * 1024
_TURN = 256
"""Events between which others get a turn."""

Reader = TypeVar("Reader", ChoiceStream, ChoiceStream | PromptScores)


class CompletionResponse(Response):
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
        summary = self._summary = summary_of(scope)
        summary.request, summary.model = self._job.request, self._job.model
        trace = trace_of(scope)
        with self._client.start(trace.timed(self._job.sequences) if trace else self._job.sequences) as generation:
            watcher = asyncio.create_task(_watch(receive, generation))
            try:
                await (self._stream if self._job.request.stream else self._send_at_once)(generation, send)
            except RequestError as error:
                summary.note_error(error)
                raise
            finally:
                watcher.cancel()
                summary.usage = self._job.usage()
                summary.finish_reasons = [choice.finish_reason for choice in self._job.choices if choice.finish_reason]
                if trace:
                    trace.generated(self._job.sequences, generation, self._text_seconds)

    async def _send_at_once(self, generation: Generation, send: Send) -> None:
        parts = await self._parts(generation)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % sum(map(len, parts)))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for block in _blocks(parts):
            await send({"type": "http.response.body", "body": block, "more_body": bool(block)})
            if generation.unfinished:  # there is only one thing left to hear: the client is gone
                await generation.read()

    async def _parts(self, generation: Generation) -> list[Encoded]:
        """The complete response, once all has been generated."""
        job, timing = self._job, self._metrics.timing()
        readers: list[ChoiceStream | PromptScores] = [*job.choices, *job.scores]
        while generation.unfinished:
            events = await generation.read()
            timing.tokens(_token_places(events))
            for start in range(0, len(events), _TURN):
                if start:
                    await asyncio.sleep(0)
                self._collect(generation, readers, events[start : start + _TURN])
        for reader in readers:
            job.encoder.collect(reader)
        return job.encoder.response(job.choices, job.scores, job.usage())

    def _collect(
        self, generation: Generation, readers: Sequence[ChoiceStream | PromptScores], events: Sequence[Event]
    ) -> None:
        """Text is put together at the end; what is said of tokens is too much for then."""
        started = time.perf_counter()
        for reader in _advance(generation, readers, events):
            if self._job.encoder.shows_tokens or isinstance(reader, PromptScores):
                self._job.encoder.collect(reader)
        self._text_seconds += time.perf_counter() - started

    async def _stream(self, generation: Generation, send: Send) -> None:
        stream = EventStream(send, generation, self._http.keepalive_seconds)
        try:
            end = await self._events_but_the_last(generation, stream)
            await stream.write(end + DONE, last=True)
        finally:
            stream.close()

    async def _events_but_the_last(self, generation: Generation, stream: EventStream) -> bytes:
        """Write the stream up to its last event, and return that one."""
        try:
            await self._events(generation, stream)
            return self._job.encoder.closing(self._job.usage())
        except ClientGone:
            raise
        except Exception as error:
            if not stream.started:
                raise
            fault = error if isinstance(error, RequestError) else internal_error()
            self._summary.note_error(fault)
            return error_event(fault)

    async def _events(self, generation: Generation, stream: EventStream) -> None:
        encoder, choices = self._job.encoder, self._job.choices
        timing = self._metrics.timing()
        opened = False
        while generation.unfinished:
            events = await generation.read()
            if not events:
                await stream.write(KEEP_ALIVE)
                continue
            started = time.perf_counter()
            grown = _advance(generation, choices, events)
            chunks = [encoder.chunk(choice) for choice in grown if _chunk_is_due(choice, encoder)]
            self._text_seconds += time.perf_counter() - started
            if not opened:
                chunks.insert(0, encoder.opening(choices))
                opened = True
            timing.tokens(_token_places(events))
            if data := b"".join(chunks):
                await stream.write(data)


def _blocks(parts: list[Encoded]) -> Iterator[bytes]:
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


def _advance(generation: Generation, readers: Sequence[Reader], events: Sequence[Event]) -> list[Reader]:
    """Give each reader its events; those that gained something, in order of their first event."""
    gained: dict[int, Reader] = {}
    for place, item, details in events:
        reader = readers[place]
        if reader.finish_reason is not None:
            continue
        if isinstance(item, CachedTokens):
            reader.cached_tokens = item.count
            continue
        gained[place] = reader
        if isinstance(item, Ended):
            reader.end(item)
        elif reader.push(item, details):
            generation.abort(place)
    return list(gained.values())


def _token_places(events: Sequence[Event]) -> list[int]:
    """The choice of each token among `events`."""
    return [place for place, item, _ in events if isinstance(item, int)]


def _chunk_is_due(choice: ChoiceStream, encoder: ResponseEncoder) -> bool:
    """Whether a chunk is due: the last text waits for the finish reason, and so comes with it."""
    if choice.finish_reason is not None:
        return True
    return not choice.settled and (choice.has_text or encoder.shows_tokens)


async def _watch(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientGone())
