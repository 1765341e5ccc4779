"""The channel of an asyncio process, with the other processes' at its far end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.wire.api import Abort, FromApi, GetStats, Progress, ToApi
from server.wire.async_channel import AsyncChannel
from server.wire.base import Stop
from server.wire.channel import Channel, endpoint

BIG = Progress(list(range(2**40, 2**40 + 200_000)), list(range(200_000)))  # more than a socket takes at once


async def test_both_sides_hear_each_other_in_order(tmp_path: Path) -> None:
    """The coordinator comes later; then one message is larger than the buffers."""
    api: AsyncChannel[ToApi, FromApi] = AsyncChannel(endpoint(tmp_path, "api"), ToApi, bind=False)
    sending = asyncio.create_task(api.send(GetStats()))
    await asyncio.sleep(0.1)
    coordinator: Channel[FromApi, ToApi] = Channel(endpoint(tmp_path, "api"), FromApi, bind=True)
    await sending
    await api.send(Abort([1]))
    heard = [await asyncio.to_thread(coordinator.receive, 10) for _ in range(2)]
    assert heard == [GetStats(), Abort([1])]
    coordinator.send(BIG)
    coordinator.send(Stop())
    delivering = asyncio.create_task(asyncio.to_thread(coordinator.deliver, 10))
    assert [await api.receive(), await api.receive()] == [BIG, Stop()]
    assert await delivering
    api.close()
    coordinator.close()


async def test_a_message_that_is_given_up_waiting_for_is_not_lost(tmp_path: Path) -> None:
    api: AsyncChannel[ToApi, FromApi] = AsyncChannel(endpoint(tmp_path, "api"), ToApi, bind=False)
    coordinator: Channel[FromApi, ToApi] = Channel(endpoint(tmp_path, "api"), FromApi, bind=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(api.receive(), 0.1)
    coordinator.send(Stop())
    assert await api.receive() == Stop()
    api.close()
    coordinator.close()


async def test_a_coordinator_that_has_gone_is_noticed(tmp_path: Path) -> None:
    api: AsyncChannel[ToApi, FromApi] = AsyncChannel(endpoint(tmp_path, "api"), ToApi, bind=False)
    coordinator: Channel[FromApi, ToApi] = Channel(endpoint(tmp_path, "api"), FromApi, bind=True)
    await api.send(GetStats())
    assert await asyncio.to_thread(coordinator.receive, 10) == GetStats()
    coordinator.close()
    with pytest.raises(asyncio.IncompleteReadError):
        await api.receive()
    api.close()
