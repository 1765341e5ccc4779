"""Who is let in, and who is not: wrong keys, reflections, rubbish, slow talkers. Over real sockets."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from server.config import parse_config
from server.errors import StartError, UnreachableError
from server.remote import handshake
from server.remote.agreement import compare
from server.remote.handshake import Verdict, greet, load_key, welcome

KEY, OTHER = b"k" * 32, b"o" * 32
FACTS = {"top_k": "32", "model": "abc"}


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with one, other:
        yield one, other


class Worker(threading.Thread):
    """The worker's side; `outcome` is what `welcome` came to. It closes its end, as the door does with strangers."""

    def __init__(self, peer: socket.socket, facts: dict[str, str] = FACTS) -> None:
        super().__init__(daemon=True)
        self._peer, self._facts = peer, facts
        self.outcome: bool | Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = welcome(self._peer, KEY, lambda theirs: compare(theirs, self._facts))
        except UnreachableError as error:
            self.outcome = error
        self._peer.shutdown(socket.SHUT_RDWR)

    def came_to(self) -> bool | Exception | None:
        self.join(10)
        return self.outcome


def frame(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def rest(peer: socket.socket) -> bytes:
    """Everything that still comes."""
    peer.settimeout(10)
    found = b""
    try:
        while data := peer.recv(4096):
            found += data
    except ConnectionResetError:
        pass
    return found


def test_two_that_know_the_key_and_agree(ends):
    worker = Worker(ends[1])
    greet(ends[0], KEY, FACTS)
    assert worker.came_to() is True


def test_a_coordinator_with_another_key(ends):
    worker = Worker(ends[1])
    with pytest.raises(UnreachableError, match="does not accept this host's cluster key") as raised:
        greet(ends[0], OTHER, FACTS)
    assert raised.value.final
    assert "does not know the cluster key" in str(worker.came_to())


def test_a_worker_that_only_sends_back_what_it_hears(ends):
    """A reflected number and proof: the proof is for another role."""

    def reflect() -> None:
        for _ in range(2):
            ends[1].sendall(ends[1].recv(36, socket.MSG_WAITALL))

    threading.Thread(target=reflect, daemon=True).start()
    with pytest.raises(UnreachableError, match="does not know the cluster key") as raised:
        greet(ends[0], KEY, FACTS)
    assert raised.value.final


def test_a_stranger_gets_a_random_number_and_nothing_else(ends):
    worker = Worker(ends[1])
    ends[0].sendall(frame(b"n" * 32) + frame(b"p" * 32))
    assert len(rest(ends[0])) == 36
    assert "does not know the cluster key" in str(worker.came_to())


def test_a_conversation_that_was_heard_before_is_worth_nothing(ends):
    first = handshake._proof(KEY, handshake._COORDINATOR, b"n" * 32, b"m" * 32)
    worker = Worker(ends[1])
    ends[0].sendall(frame(b"n" * 32) + frame(first) + frame(msgspec.msgpack.encode(FACTS)))
    assert len(rest(ends[0])) == 36
    assert isinstance(worker.came_to(), UnreachableError)


@pytest.mark.parametrize(
    "rubbish", [b"GET / HTTP/1.1\r\n\r\n", frame(b""), frame(b"n" * 31), struct.pack("<I", 2**32 - 1)], ids=str
)
def test_rubbish_is_answered_with_nothing(ends, rubbish):
    worker = Worker(ends[1])
    ends[0].sendall(rubbish)
    assert rest(ends[0]) == b""
    assert "does not speak polylogit" in str(worker.came_to())


def test_a_visitor_that_leaves_without_a_word(ends):
    worker = Worker(ends[1])
    ends[0].close()
    assert worker.came_to() is False


def test_one_that_talks_slowly_is_cut_off_in_time(ends, monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.4)
    worker = Worker(ends[1])
    started = time.monotonic()
    with pytest.raises(OSError):
        for byte in frame(b"n" * 32) * 10:
            ends[0].sendall(bytes([byte]))
            time.sleep(0.05)
    assert "no handshake within 0.4 s" in str(worker.came_to())
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["top_k", "model"])
def test_what_does_not_fit_is_named(ends, name):
    worker = Worker(ends[1], FACTS | {name: "other"})
    with pytest.raises(UnreachableError) as raised:
        greet(ends[0], KEY, FACTS)
    assert str(raised.value) == f"{name} is other there and {FACTS[name]} here" and raised.value.final
    assert isinstance(worker.came_to(), UnreachableError)


def test_a_fact_that_only_one_side_knows_is_no_difference():
    assert compare(FACTS, FACTS | {"weights": "x"}) == Verdict("", final=False)


def test_the_key(tmp_path: Path, monkeypatch):
    def config(**settings):
        experts = [{"name": "a", "model": "a", "address": "10.0.0.2:8100"}]
        return parse_config({"name": "fake", "experts": experts, **settings}, directory=tmp_path)

    monkeypatch.delenv("POLYLOGIT_CLUSTER_KEY", raising=False)
    with pytest.raises(StartError, match="POLYLOGIT_CLUSTER_KEY or cluster_key_file"):
        load_key(config())
    with pytest.raises(StartError, match=r"key\.txt: cannot be read"):
        load_key(config(cluster_key_file="key.txt"))
    (tmp_path / "key.txt").write_bytes(b"short\n")
    with pytest.raises(StartError, match="has 5 characters, at least 32"):
        load_key(config(cluster_key_file="key.txt"))
    (tmp_path / "key.txt").write_bytes(KEY + b"\n")
    assert load_key(config(cluster_key_file="key.txt")) == KEY
    monkeypatch.setenv("POLYLOGIT_CLUSTER_KEY", OTHER.decode())
    assert load_key(config()) == OTHER
