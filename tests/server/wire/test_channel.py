"""Channels over real sockets: order, size, a peer that comes late or goes away."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.wire.api import Abort, FromApi, GetStats, Progress, ToApi
from server.wire.base import Stop
from server.wire.channel import Channel, Selector, endpoint
from server.wire.expert import WholeRows

BIG = Abort(list(range(2**40, 2**40 + 300_000)))  # about 2.7 MB


class Sockets:
    """Both ends of conversations in a directory; closed at the end of the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: list[Channel] = []

    def server(self, name: str = "socket") -> Channel[FromApi, ToApi]:
        return self._keep(Channel(endpoint(self._directory, name), FromApi, bind=True))

    def client(self, name: str = "socket") -> Channel[ToApi, FromApi]:
        return self._keep(Channel(endpoint(self._directory, name), ToApi, bind=False))

    def close(self) -> None:
        for channel in self._open:
            channel._unsent.clear()
            channel.close()

    def _keep(self, channel: Channel) -> Channel:
        self._open.append(channel)
        return channel


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    opened = Sockets(tmp_path)
    yield opened
    opened.close()


def test_messages_sent_before_the_peer_is_there_arrive_in_order(sockets):
    client = sockets.client()
    client.send(GetStats())
    client.send(Abort([1]))
    server = sockets.server()
    server.send(Stop())
    client.flush()  # finds the server now
    assert server.deliver(5)
    assert client.receive(5) == Stop()
    assert [server.receive(5), server.receive(5)] == [GetStats(), Abort([1])]
    assert server.receive(0) is None


def test_a_frame_larger_than_the_buffers_goes_as_fast_as_it_is_read(sockets):
    server, client = sockets.server(), sockets.client()
    found = []
    reader = threading.Thread(target=lambda: found.append(server.receive(10)))
    reader.start()
    started = time.monotonic()
    client.send(BIG)
    assert client.deliver(10)
    reader.join()
    assert found == [BIG]
    assert time.monotonic() - started < 5  # waiting for a timer at every buffer took longer than this


def test_whole_rows_of_many_sequences_take_time_in_proportion(tmp_path):
    """128 of 152k tokens. To copy what is left at every buffer took half a minute."""
    address, rows = endpoint(tmp_path, "rows"), WholeRows(1, bytes(128 * 152_000 * 4))
    server: Channel[WholeRows, Stop] = Channel(address, WholeRows, bind=True)
    client: Channel[Stop, WholeRows] = Channel(address, Stop, bind=False)
    sender = threading.Thread(target=lambda: (client.reach(5), client.send(rows), client.deliver(60)))
    sender.start()
    started = time.monotonic()
    found = server.receive(60)
    took = time.monotonic() - started
    sender.join()
    client.close()
    server.close()
    assert found == rows
    assert took < 5


def test_deliver_says_when_nobody_reads(sockets):
    server, client = sockets.server(), sockets.client()
    client.send(BIG)
    assert not client.deliver(0.2)
    assert server.receive(0) is None  # half a frame is no message


def test_a_peer_that_goes_away_is_noticed_and_may_come_back(sockets):
    server, client = sockets.server(), sockets.client()
    client.send(GetStats())
    assert server.receive(5) == GetStats()
    client.send(BIG)
    client._unsent.clear()  # it dies in the middle of a frame
    client.close()
    assert server.receive(0.2) is None and not server.connected
    again = sockets.client()
    again.send(Abort([7]))
    assert server.receive(5) == Abort([7])


def test_a_selector_hands_one_message_of_each_channel_to_its_handler(sockets):
    one, first = sockets.server("one"), sockets.client("one")
    two, second = sockets.server("two"), sockets.client("two")
    heard: list[tuple[str, object]] = []
    selector = Selector()
    selector.register(one, lambda message: heard.append(("one", message)))
    selector.register(two, lambda message: heard.append(("two", message)))
    first.send(Abort([1]))
    first.send(Abort([2]))
    second.send(GetStats())
    deadline = time.monotonic() + 5
    while len(heard) < 3 and time.monotonic() < deadline:
        selector.dispatch(1)
    assert sorted(name for name, _ in heard) == ["one", "one", "two"]
    assert [message for name, message in heard if name == "one"] == [Abort([1]), Abort([2])]
    selector.unregister(two)
    second.send(GetStats())
    selector.dispatch(0)
    assert len(heard) == 3
    one.send(Progress([1], [2]))
    assert first.receive(5) == Progress([1], [2])


def test_a_message_on_this_host_may_be_of_any_length(sockets, tmp_path):
    """Many choices of a long prompt are one. Only what another host sends has a limit."""
    server = sockets.server()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(endpoint(tmp_path, "socket"))
        client.sendall(struct.pack("<I", 2**32 - 1) + b"the beginning")
        assert server.receive(0.05) is None
        assert server.connected
