"""What the api process costs, and how long its event loop lets anyone wait:

    python -m tests.bench.api --json docs/benchmarks/api.json

The api runs in a process of its own, with a heartbeat in its event loop; this process is its clients and, in place of a
coordinator, an engine that answers at once. Every tick brings one token to every stream, and the next tick comes when
all clients have read theirs, so a token is a chunk of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import httpx

from gate.options import Output, run_module, whole
from server.api import process
from server.config import Config
from server.request import FinishReason
from server.tools.provenance import cpu_times, processor, steal, versions
from server.wire.api import Abort, Ended, FromApi, Progress, Status, Submit, ToApi, TokenDetails
from server.wire.async_channel import AsyncChannel
from server.wire.base import Stop
from tests.support.api.deployment import deployment

CONTEXT = 131_072
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_BEAT_SECONDS = 0.001
_TICK_SECONDS = 0.002
_DETAILS = TokenDetails(-0.5, 1, [(ord("a") - rank, -0.5 - rank) for rank in range(20)], [0.75, 0.25])
_USER = {"role": "user", "content": "x"}


@dataclass
class Spent:
    """Of the api process, seconds: the longest that its event loop was busy without a pause, by the clock and in
    processor time of its thread, and the processor time of the whole process."""

    stall: float
    stall_cpu: float
    cpu: float


@dataclass
class Streams:
    """`first`: seconds from a request to its first token; `cpu_per_token`: microseconds of the api process."""

    streams: int
    tokens: int
    first: list[float]
    seconds: float
    cpu_per_token: float
    stall: float


# --- the api process ---


class _Heart:
    """Runs in the event loop, and answers on `pipe` what was seen since it was last asked."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pipe.fileno(), self._answer)
        self._start()
        self._beat()

    def _start(self) -> None:
        self._stall = self._stall_cpu = 0.0
        self._cpu = time.process_time()
        self._last, self._last_cpu = time.perf_counter(), time.thread_time()

    def _look(self) -> None:
        now, cpu = time.perf_counter(), time.thread_time()
        self._stall = max(self._stall, now - self._last - _BEAT_SECONDS)
        self._stall_cpu = max(self._stall_cpu, cpu - self._last_cpu)
        self._last, self._last_cpu = now, cpu

    def _beat(self) -> None:
        self._look()
        self._loop.call_later(_BEAT_SECONDS, self._beat)

    def _answer(self) -> None:
        with contextlib.suppress(EOFError):
            self._pipe.recv_bytes()
            self._look()
            seen = Spent(self._stall, self._stall_cpu, time.process_time() - self._cpu)
            self._pipe.send_bytes(json.dumps(asdict(seen)).encode())
            self._start()


def _run_api(config: Config, address: str, listener: socket.socket, pipe: Connection) -> None:
    async def serve_with_heart(*arguments: Any) -> None:
        heart = _Heart(pipe)
        await serve(*arguments)
        del heart

    serve = process.serve
    process.serve = serve_with_heart
    process.run(config, address, listener)


# --- the engine ---


@dataclass
class Engine:
    """Speaks as the coordinator. Streams of `length` tokens advance together, once `start` of them are there."""

    channel: AsyncChannel[FromApi, ToApi]
    start: int = 1
    length: int = 1
    running: list[int] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    read: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def listen(self) -> None:
        await self.channel.send(Status(ready=True, draining=False, experts={"math": "up", "text": "up"}))
        while True:
            match await self.channel.receive():
                case Submit(sequences=sequences):
                    self.running += [sequence.id for sequence in sequences]
                    if len(self.running) >= self.start:
                        self.begun.set()
                case Abort(sequences=numbers):
                    self.running = [number for number in self.running if number not in numbers]

    async def play(self) -> None:
        """One round of streams, tick by tick."""
        await self.begun.wait()
        self.begun.clear()
        for tick in range(self.length):
            for _ in self.running if tick else ():
                await self.read.acquire()
            await self.channel.send(Progress(self.running, [ord("a")] * len(self.running)))
        await self._end()

    async def play_scored(self) -> None:
        """The same for whole answers with alternatives for every token; nobody reads before the end."""
        await self.begun.wait()
        self.begun.clear()
        for _ in range(self.length):
            details = dict.fromkeys(self.running, _DETAILS)
            await self.channel.send(Progress(self.running, [ord("a")] * len(self.running), details))
            await asyncio.sleep(_TICK_SECONDS)
        await self._end()

    async def _end(self) -> None:
        for number in self.running:
            await self.channel.send(Ended(number, FinishReason.LENGTH))
        self.running = []


# --- the clients ---


@dataclass
class Bench:
    port: int
    engine: Engine
    pipe: Connection

    async def spent(self) -> Spent:
        """What was seen since the last call."""
        self.pipe.send_bytes(b"?")
        return Spent(**json.loads(await asyncio.to_thread(self.pipe.recv_bytes)))

    async def streams(self, count: int, tokens: int) -> Streams:
        """`count` concurrent streams of `tokens` tokens."""
        self.engine.start, self.engine.length = count, tokens + 1  # the last one comes with the end
        playing = asyncio.create_task(self.engine.play())
        await self.spent()
        started = time.perf_counter()
        first = await asyncio.gather(*(self._stream(tokens) for _ in range(count)))
        seconds = time.perf_counter() - started
        await playing
        spent = await self.spent()
        return Streams(count, tokens, first, seconds, 1e6 * spent.cpu / (count * tokens), spent.stall)

    async def _stream(self, tokens: int) -> float:
        started = time.perf_counter()
        reader, writer = await self._post(CHAT, {"messages": [_USER], "stream": True, "max_tokens": tokens + 1})
        first = 0.0
        async for line in reader:
            if line.startswith(b"data: {") and b'"content":"a"' in line and b'"finish_reason":null' in line:
                first = first or time.perf_counter() - started
                self.engine.read.release()
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()
        return first

    async def whole(self, choices: int, tokens: int) -> tuple[int, Spent]:
        """The bytes of one whole answer with 20 alternatives for every token, and what it cost."""
        await self.spent()
        self.engine.start, self.engine.length = choices, tokens
        playing = asyncio.create_task(self.engine.play_scored())
        scored = {"logprobs": True, "top_logprobs": 20}
        reader, writer = await self._post(CHAT, {"messages": [_USER], "n": choices, "max_tokens": tokens, **scored})
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        assert [len(choice["logprobs"]["content"]) for choice in body["choices"]] == [tokens] * choices
        writer.close()
        await playing
        return length, await self.spent()

    async def refusal(self, path: str, body: bytes) -> tuple[int, Spent]:
        """The status of the answer to one body, and what it cost."""
        await self.spent()
        self.engine.start, self.engine.length = 1, 0
        playing = asyncio.create_task(self.engine.play())
        reader, writer = await self._post(path, body)
        status = int((await reader.readline()).split()[1])
        writer.close()
        playing.cancel()
        return status, await self.spent()

    async def ready(self) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}") as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health/ready")).status_code == 200:
                        return
                await asyncio.sleep(0.05)

    async def _post(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    """An api process that is ready."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as listener:
        folder, address = Path(directory), f"{directory}/api"
        config = deployment(folder)
        _lengthen(folder / "model" / "config.json")
        listener.bind(("127.0.0.1", 0))
        ours, theirs = multiprocessing.Pipe()
        engine = Engine(AsyncChannel(address, FromApi, bind=True))
        arguments = (config, address, listener, theirs)
        child = multiprocessing.get_context("spawn").Process(target=_run_api, args=arguments, daemon=True)
        child.start()
        listening = asyncio.create_task(engine.listen())
        made = Bench(listener.getsockname()[1], engine, ours)
        try:
            async with asyncio.timeout(60):
                await made.ready()
            yield made
        finally:
            listening.cancel()
            await engine.channel.send(Stop())
            await asyncio.to_thread(child.join, 10)
            child.kill()
            engine.channel.close()


def _lengthen(path: Path) -> None:
    """Give the model the context of a large one."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))


def _called(arguments: dict[str, Any]) -> dict[str, Any]:
    """A conversation with seventy calls of these arguments."""
    call = {"function": {"name": "f", "arguments": json.dumps(arguments)}}
    return {"messages": [_USER, {"role": "assistant", "tool_calls": [call] * 70}]}


def bodies() -> dict[str, tuple[str, bytes]]:
    """Name -> path and body, all of nearly 4 MB, each the worst of its kind for some step on the way."""
    schema = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(24_000)}}
    made: dict[str, tuple[str, Any]] = {
        "one long text": (CHAT, {"messages": [{**_USER, "content": "word, [y] {z} " * 110_000}]}),
        "a text that cannot fit": (CHAT, {"messages": [{**_USER, "content": "x" * 3_900_000}]}),
        "special tokens as text": (CHAT, {"messages": [{**_USER, "content": "<|end|>" * 540_000}]}),
        "thousands of messages": (CHAT, {"messages": [{**_USER, "content": "x" * 800}] * 4096}),
        "thousands of short messages": (CHAT, {"messages": [_USER] * 4096}),
        "too many messages": (CHAT, {"messages": [_USER] * 49_000}),
        "text parts": (CHAT, {"messages": [{**_USER, "content": [{"type": "text", "text": "ab"}] * 49_000}]}),
        "objects nobody asked for": (CHAT, {"messages": [_USER], "metadata": [{"a": 1}] * 300_000}),
        "empty objects": (CHAT, {"messages": [_USER], "x": [{}] * 900_000}),
        "a schema of a tool": (
            CHAT,
            {"messages": [_USER], "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        ),
        "a schema of the answer": (
            CHAT,
            {
                "messages": [_USER],
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            },
        ),
        "arguments of calls": (CHAT, _called({"a": [[1]] * 680, "b": "x" * 50_000})),
        "too much in arguments of calls": (CHAT, _called({"a": [[1]] * 9000})),
        "logit_bias": (CHAT, {"messages": [_USER], "logit_bias": {str(key): 1 for key in range(199_000)}}),
        "strings": (CHAT, {"messages": [_USER], "stop": ["a"] * 199_000}),
        "token ids": (COMPLETIONS, {"prompt": [5] * 1_300_000}),
        "lists of token ids": (COMPLETIONS, {"prompt": [[5] * 1200] * 1000}),
        "many lists": (COMPLETIONS, {"prompt": [[5]] * 600_000}),
        "a thousand prompts": (COMPLETIONS, {"prompt": ["x" * 3500] * 1000}),
    }
    return {name: (path, json.dumps(body).encode()) for name, (path, body) in made.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiBenchOptions:
    """Of `python -m tests.bench.api`."""

    streams: Annotated[int, whole(1)] = 64
    """Streams at the same time."""
    tokens: Annotated[int, whole(1)] = 256
    """Tokens of each stream."""
    rounds: Annotated[int, whole(1)] = 5
    """Of everything."""
    json: Annotated[Path | None, Output()] = None
    """Write the measurements here (default: nowhere)."""


async def measure(options: ApiBenchOptions) -> dict[str, Any]:
    before = cpu_times()
    async with bench() as made:
        await made.streams(options.streams, 16)  # warms up
        rounds = [await made.streams(options.streams, options.tokens) for _ in range(options.rounds)]
        whole = [await made.whole(16, 1000) for _ in range(options.rounds)]
        stalls: dict[str, Any] = {}
        for name, (path, body) in bodies().items():
            seen = [await made.refusal(path, body) for _ in range(options.rounds)]
            stalls[name] = {
                "bytes": len(body),
                "status": seen[0][0],
                "stall_ms": [round(1e3 * spent.stall, 1) for _, spent in seen],
                "stall_cpu_ms": [round(1e3 * spent.stall_cpu, 1) for _, spent in seen],
            }
            print(f"{name:28} {len(body) / 1e6:.1f} MB  {stalls[name]}", flush=True)
    return {
        "command": f"python -m tests.bench.api --streams {options.streams} --tokens {options.tokens}"
        f" --rounds {options.rounds}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "steal": steal(before, cpu_times()),
        "streams": [_row(one) for one in rounds],
        "whole_answer": {
            "bytes": whole[0][0],
            "stall_ms": [round(1e3 * spent.stall, 1) for _, spent in whole],
            "stall_cpu_ms": [round(1e3 * spent.stall_cpu, 1) for _, spent in whole],
        },
        "bodies": stalls,
    }


def _row(one: Streams) -> dict[str, Any]:
    first = sorted(1e3 * value for value in one.first)
    row = {
        "streams": one.streams,
        "tokens": one.tokens,
        "first_token_ms_median": round(statistics.median(first), 2),
        "first_token_ms_last": round(first[-1], 2),
        "cpu_us_per_token": round(one.cpu_per_token, 1),
        "tokens_per_second": round(one.streams * one.tokens / one.seconds),
        "stall_ms": round(1e3 * one.stall, 2),
    }
    print(row, flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m tests.bench.api", __doc__, ApiBenchOptions, run, arguments)


def run(options: ApiBenchOptions) -> None:
    """Run the command."""
    document = asyncio.run(measure(options))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
