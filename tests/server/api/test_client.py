"""The conversation with the coordinator, without sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from server.api.client import EngineClient
from server.errors import GenerationFailed, Overloaded
from server.policy import Uniform
from server.request import FinishReason, SequenceRequest
from server.wire.api import Abort, Ended, FromApi, GetStats, Progress, Status, Submit, ToApi
from server.wire.base import Stop
from tests.support.api.fake_coordinator import stats

READY = Status(ready=True, draining=False, experts={})


class Link:
    """Two lists instead of a socket."""

    def __init__(self) -> None:
        self.sent: list[FromApi] = []
        self.incoming: asyncio.Queue[ToApi] = asyncio.Queue()

    async def send(self, message: FromApi) -> None:
        self.sent.append(message)

    async def receive(self) -> ToApi:
        return await self.incoming.get()

    async def say(self, *messages: ToApi) -> None:
        for message in messages:
            self.incoming.put_nowait(message)
        for _ in range(10):
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def talking() -> AsyncIterator[tuple[Link, EngineClient]]:
    link = Link()
    client = EngineClient(link)
    task = asyncio.create_task(client.run())
    await link.say(READY)
    yield link, client
    await link.say(Stop())
    await asyncio.wait_for(task, 1)


def sequences(client: EngineClient, count: int) -> list[SequenceRequest]:
    return [SequenceRequest(client.number(), [[1]], Uniform()) for _ in range(count)]


async def test_tokens_find_their_request() -> None:
    async with talking() as (link, client):
        one, two = sequences(client, 1), sequences(client, 2)
        with client.start(one) as first, client.start(two) as second:
            numbers = [sequence.id for sequence in one + two]
            await link.say(Progress(numbers, [7, 8, 9], {}))
            assert await first.read() == [(0, 7, None)]
            assert await second.read() == [(0, 8, None), (1, 9, None)]
            ends = [Ended(number, FinishReason.STOP) for number in numbers]
            await link.say(*ends)
            assert await second.read() == [(0, ends[1], None), (1, ends[2], None)]
            assert await first.read() == [(0, ends[0], None)]
            assert not first.unfinished and not second.unfinished
        assert [type(message) for message in link.sent] == [Submit, Submit]


async def test_leaving_aborts_in_one_message() -> None:
    async with talking() as (link, client):
        with client.start(three := sequences(client, 3)) as generation:
            await link.say(Ended(three[1].id, FinishReason.STOP))
            generation.abort(0)
        await link.say()
        assert link.sent[1:] == [Abort([three[0].id]), Abort([three[2].id])]
        await link.say(Progress([three[0].id], [1], {}), Ended(three[0].id, FinishReason.STOP))


async def test_what_was_not_read_when_the_end_came_is_still_there() -> None:
    """A client that reads slowly gets its whole answer."""
    async with talking() as (link, client):
        with client.start(one := sequences(client, 1)) as generation:
            end = Ended(one[0].id, FinishReason.LENGTH)
            await link.say(Progress([one[0].id], [7], {}), end)
            assert generation.unfinished
            generation.abort(0)  # a stop string completed by the last token: nothing is left to stop
            assert await generation.read() == [(0, 7, None), (0, end, None)]
            assert not generation.unfinished
        assert [type(message) for message in link.sent] == [Submit]


async def test_one_lost_sequence_ends_the_request() -> None:
    async with talking() as (link, client):
        with client.start(two := sequences(client, 2)) as generation:
            await link.say(Ended(two[0].id, FinishReason.ERROR, message="lost"))
            with pytest.raises(GenerationFailed, match="lost"):
                await generation.read()
        await link.say()
        assert link.sent[1:] == [Abort([two[1].id])]


async def test_a_reader_that_never_reads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.client._MAX_WAITING", 3)
    async with talking() as (link, client):
        with client.start(one := sequences(client, 1)) as generation:
            await link.say(*(Progress([one[0].id], [token], {}) for token in range(5)))
            with pytest.raises(GenerationFailed, match="slowly"):
                await generation.read()
        assert link.sent[1:] == [Abort([one[0].id])]


async def test_a_nudge_wakes_the_reader_with_nothing() -> None:
    async with talking() as (_, client):
        with client.start(sequences(client, 1)) as generation:
            asyncio.get_running_loop().call_later(0.01, generation.nudge)
            assert await asyncio.wait_for(generation.read(), 1) == []


async def test_stop_ends_what_runs() -> None:
    link = Link()
    client = EngineClient(link)
    task = asyncio.create_task(client.run())
    await link.say(READY)
    with client.start(sequences(client, 1)) as generation:
        await link.say(Stop())
        await asyncio.wait_for(task, 1)
        with pytest.raises(Overloaded):
            await generation.read()
    with pytest.raises(Overloaded):
        client.start(sequences(client, 1))


async def test_nothing_starts_before_it_is_ready() -> None:
    client = EngineClient(Link())
    with pytest.raises(Overloaded):
        client.start(sequences(client, 1))


async def test_statistics_are_asked_for_once_and_remembered() -> None:
    async with talking() as (link, client):
        assert await client.stats(0.01) is None
        both = asyncio.gather(client.stats(1), client.stats(1))
        await link.say()
        await link.say(stats())
        assert await both == [stats(), stats()]
        assert [type(message) for message in link.sent] == [GetStats, GetStats]
        assert await client.stats(0.01) == stats()


def test_numbers_are_never_repeated() -> None:
    first, second = EngineClient(Link()), EngineClient(Link())
    numbers = [first.number() for _ in range(100)] + [second.number()]
    assert len(set(numbers)) >= 100 and max(numbers) < 2**63
