"""A coordinator without experts: it speaks the real messages over a real socket and says what a test tells it
to say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

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
from server.wire.async_channel import AsyncChannel
from server.wire.base import Stop
from server.wire.stats import ExpertStats, FusionStats, Histogram, Stats
from tests.support.api.deployment import END, ids

UP = {"math": "up", "text": "up"}


@dataclass
class Script:
    """What every sequence is answered with: `tokens`, then its end (the length, a stop token, or `ended`).

    `weigh`: token -> the experts' coefficients."""

    tokens: Callable[[SequenceRequest], list[int]] = lambda _: [*ids("Hello, world!"), END]
    ended: Callable[[SequenceRequest], Ended] | None = None
    pause: float = 0.0
    cached: int = 0
    stats: bool = True
    weigh: Callable[[int], list[float]] = lambda _: [0.75, 0.25]


class FakeCoordinator:
    """Bind it, then `run` it. `submitted` and `aborted` are what the api asked for; `running` what still
    runs."""

    def __init__(self, address: str) -> None:
        self._channel: AsyncChannel[FromApi, ToApi] = AsyncChannel(address, FromApi, bind=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.reset()

    def reset(self) -> None:
        self.script = Script()
        self.submitted: list[SequenceRequest] = []
        self.aborts: list[list[int]] = []
        self.running: set[int] = set()

    async def run(self) -> None:
        while True:
            match await self._channel.receive():
                case Submit(sequences=sequences):
                    self.submitted += sequences
                    self.running |= {sequence.id for sequence in sequences}
                    task = asyncio.create_task(self._answer(sequences))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case Abort(sequences=numbers):
                    self.aborts.append(numbers)
                    self.running -= set(numbers)
                case GetStats():
                    if self.script.stats:
                        await self._channel.send(stats())

    async def status(self, *, ready: bool = True, draining: bool = False) -> None:
        await self._channel.send(Status(ready=ready, draining=draining, experts=UP))

    async def stop(self) -> None:
        await self._channel.send(Stop())

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._channel.close()

    async def aborted(self) -> list[list[int]]:
        """The aborts, once there is one."""
        async with asyncio.timeout(5):
            while not self.aborts:
                await asyncio.sleep(0.005)
        return self.aborts

    async def idle(self) -> None:
        """Wait until nothing runs."""
        async with asyncio.timeout(5):
            while self.running:
                await asyncio.sleep(0.005)

    async def busy(self, count: int = 1) -> None:
        """Wait until `count` sequences were submitted."""
        async with asyncio.timeout(5):
            while len(self.submitted) < count:
                await asyncio.sleep(0.005)

    async def _answer(self, sequences: list[SequenceRequest]) -> None:
        script, came = self.script, time.perf_counter()
        plans = {sequence.id: _cut(script.tokens(sequence), sequence) for sequence in sequences}
        asked = {sequence.id: sequence for sequence in sequences}
        for tick in range(max(map(len, plans.values()))):
            tokens = {n: plan[tick] for n, plan in plans.items() if tick < len(plan) and n in self.running}
            if not tokens:
                break
            details = {n: self._details(asked[n], token) for n, token in tokens.items() if _wants(asked[n])}
            cached = dict.fromkeys(tokens, script.cached) if tick == 0 else {}
            timings = {n: self._timing(asked[n], came) for n in tokens if asked[n].timed} if tick == 0 else {}
            await self._channel.send(Progress(list(tokens), list(tokens.values()), details, cached, timings))
            await asyncio.sleep(script.pause)
        for number, plan in plans.items():
            if number in self.running:
                self.running.discard(number)
                await self._channel.send(_ended(script, asked[number], plan))

    def _timing(self, sequence: SequenceRequest, came: float) -> SequenceTiming:
        """Queued for a tenth of the time until now; the experts read the prompt one after another in the rest."""
        now = time.perf_counter()
        admitted = came + (now - came) / 10
        share = (now - admitted) / len(sequence.prompts)
        prefilled = [admitted + share * (index + 1) if own else 0.0 for index, own in enumerate(sequence.prompts)]
        return SequenceTiming(came, prefilled, admitted, now)

    def _details(self, sequence: SequenceRequest, token: int) -> TokenDetails:
        """The token has log-probability -0.5, the id before it -1, the one before that -2 and so on."""
        top = [(token, -0.5), *((max(token - rank, 0), -float(rank)) for rank in range(1, 20))]
        return TokenDetails(-0.5, 1, top[: sequence.top_logprobs or 0], self.script.weigh(token))


def _cut(tokens: list[int], sequence: SequenceRequest) -> list[int]:
    given = len(sequence.given)
    stops = (place for place, token in enumerate(tokens) if place >= given and token in sequence.stop_token_ids)
    return tokens[: next(stops, len(tokens)) + 1][: sequence.max_tokens]


def _wants(sequence: SequenceRequest) -> bool:
    return sequence.top_logprobs is not None or sequence.expert_weights


def _ended(script: Script, sequence: SequenceRequest, plan: list[int]) -> Ended:
    if script.ended is not None:
        return script.ended(sequence)
    if plan and plan[-1] in sequence.stop_token_ids:
        return Ended(sequence.id, FinishReason.STOP, stop_token=plan[-1])
    return Ended(sequence.id, FinishReason.LENGTH)


def failure(code: str = "", message: str = "the expert 'math' was lost") -> Callable[[SequenceRequest], Ended]:
    return lambda sequence: Ended(sequence.id, FinishReason.ERROR, message=message, code=code)


def stats() -> Stats:
    histogram = Histogram([0.1, 1.0], [1, 2, 3], 4.5)
    received = {"lists": 20_480, "rows": 4_224}
    expert = ExpertStats(
        "math", True, "0.32.0", 0, histogram, 5, histogram, 0.5, 4, 0.25, 1024, 2, 0, 0, 70, 32, received
    )
    fusion = FusionStats(18, 6, {"certain": 12, "open": 5, "unbounded": 1}, histogram)
    return Stats(
        ticks=10,
        tokens=20,
        running=2,
        queued=1,
        parked=0,
        readded=0,
        position_faults=0,
        gate_failures=0,
        finished={"stop": 3},
        queue_seconds=histogram,
        tick_seconds=histogram,
        phase_seconds={"engine": 0.4, "fuse": 0.1},
        bound=Histogram([1e-3, 0.1], [15, 4, 1], 0.375),
        whole_rows={"token": 3, "logprobs": 1},
        fusion=fusion,
        experts=[expert],
    )
