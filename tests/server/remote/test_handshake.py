"""Who is let in: nobody without the key, and nobody learns it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.config import Config, parse_config
from server.errors import StartError, UnreachableError
from server.remote import handshake
from server.remote.agreement import Offer, Terms, Verdict
from server.remote.handshake import greet, load_key, welcome

KEY = b"k" * 32
OFFER = Offer({"list_length": "8"}, Terms(8, "none"))
AGREED = Verdict("", final=False)


class Talk:
    """Both ends of a handshake: `theirs` is the test's, at the other end `side` runs in a thread."""

    def __init__(self, side: Callable[[socket.socket], Any]) -> None:
        self.theirs, self._ours = socket.socketpair()
        self.theirs.settimeout(5.0)
        self.result: Any = None
        self.error: Exception | None = None
        self._side = side
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._side(self._ours)
        except UnreachableError as error:
            self.error = error
        finally:
            self._ours.close()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *exception: object) -> None:
        self.theirs.close()
        self.wait()

    def wait(self) -> Talk:
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        return self

    def send(self, data: bytes) -> None:
        self.theirs.sendall(struct.pack("<I", len(data)) + data)

    def receive(self) -> bytes:
        """A frame; empty at the end."""
        if not (length := self.theirs.recv(4, socket.MSG_WAITALL)):
            return b""
        return self.theirs.recv(struct.unpack("<I", length)[0], socket.MSG_WAITALL)

    def rest(self) -> bytes:
        """Everything until the other side closes."""
        data = b""
        try:
            while part := self.theirs.recv(4096):
                data += part
        except ConnectionResetError:
            pass  # it closed without reading all that was sent
        return data


def worker(key: bytes = KEY, verdict: Verdict = AGREED) -> Talk:
    return Talk(lambda peer: welcome(peer, key, lambda offer: verdict))


def coordinator(key: bytes = KEY) -> Talk:
    return Talk(lambda peer: greet(peer, key, OFFER))


def proof(role: bytes, coordinators: bytes, experts: bytes, key: bytes = KEY) -> bytes:
    return handshake._proof(key, role, coordinators, experts)


def test_two_that_know_the_key_come_together():
    with worker() as talk:
        greet(talk.theirs, KEY, OFFER)
        assert talk.wait().result == OFFER


def test_a_worker_that_disagrees_says_why_to_both():
    with worker(verdict=Verdict("list_length is 8 at the expert and 9 at the coordinator", final=True)) as talk:
        with pytest.raises(UnreachableError, match="list_length is 8 at the expert") as raised:
            greet(talk.theirs, KEY, OFFER)
        assert raised.value.final
        assert "list_length is 8 at the expert" in str(talk.wait().error)


def test_another_key_is_told_nothing_but_a_number():
    with worker() as talk:
        talk.send(b"c" * 32)
        number = talk.receive()
        talk.send(proof(handshake._COORDINATOR, b"c" * 32, number, key=b"x" * 32))
        assert talk.rest() == b""
        assert str(talk.wait().error) == "does not know the cluster key"
    with worker() as talk:
        with pytest.raises(UnreachableError, match="does not accept this host's cluster key") as raised:
            greet(talk.theirs, b"x" * 32, OFFER)
        assert raised.value.final


def test_a_worker_that_does_not_know_the_key_is_not_told_the_offer():
    with coordinator() as talk:
        mine = talk.receive()
        talk.send(b"e" * 32)
        talk.receive()
        talk.send(proof(handshake._EXPERT, mine, b"e" * 32, key=b"x" * 32))
        assert talk.rest() == b""
        assert str(talk.wait().error) == "it does not know the cluster key"


def test_a_proof_sent_back_to_its_sender_is_worthless():
    """A false worker answers the coordinator's number with the same number, and its proof with the same proof."""
    with coordinator() as talk:
        mine = talk.receive()
        talk.send(mine)
        talk.send(talk.receive())
        assert talk.rest() == b""
        assert str(talk.wait().error) == "it does not know the cluster key"


def test_a_true_coordinators_proof_for_another_worker_is_worthless():
    """Whoever stands between two workers cannot use what one of them is told at the other."""
    with coordinator() as told:
        mine = told.receive()
        told.send(b"e" * 32)
        overheard = told.receive()
        with worker() as talk:
            talk.send(mine)
            talk.receive()
            talk.send(overheard)
            assert talk.rest() == b""
            assert str(talk.wait().error) == "does not know the cluster key"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        struct.pack("<I", 2**32 - 1) + b"x" * 100,
        struct.pack("<I", 0),
        struct.pack("<I", 31) + b"x" * 31,
    ],
    ids=["http", "tls", "long", "empty", "short"],
)
def test_a_stranger_gets_nothing_and_is_cut_off_at_once(data):
    started = time.monotonic()
    with worker() as talk:
        talk.theirs.sendall(data)
        assert talk.rest() == b""
        assert str(talk.wait().error) == "does not speak polylogit"
    assert time.monotonic() - started < handshake.HANDSHAKE_SECONDS


def test_rubbish_after_the_proofs():
    with worker() as talk:
        talk.send(b"c" * 32)
        number = talk.receive()
        talk.send(proof(handshake._COORDINATOR, b"c" * 32, number))
        assert talk.receive() == proof(handshake._EXPERT, b"c" * 32, number)
        talk.send(b"\xc1\xff rubbish")
        assert talk.rest() == b""
        assert str(talk.wait().error) == "does not speak polylogit"


@pytest.mark.parametrize("side", [worker, coordinator])
def test_who_says_nothing_or_drips_is_cut_off(monkeypatch, side):
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.4)
    with side() as silent:
        silent.rest()
        assert str(silent.wait().error) == "no handshake within 0.4 s"
    with side() as slow:
        frame = struct.pack("<I", 32) + b"x" * 32
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1000):
                slow.theirs.sendall(frame[:1])
                frame = frame[1:] or b"x"
                time.sleep(0.1)
        assert str(slow.wait().error) in ("no handshake within 0.4 s", "does not speak polylogit")


def test_a_visitor_without_a_word_is_no_error():
    with worker() as talk:
        talk.theirs.close()
        assert talk.wait().result is None and talk.error is None


# --- the key ---


def config(directory: Path, **settings: Any) -> Config:
    data = {"name": "fake", "experts": [{"name": "a", "model": "a"}], **settings}
    return parse_config(data, directory=directory)


def test_the_key_is_in_a_file_or_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYLOGIT_CLUSTER_KEY", f" {'e' * 32}\n")
    (tmp_path / "key").write_text("f" * 32 + "\n")
    assert load_key(config(tmp_path)) == b"e" * 32
    assert load_key(config(tmp_path, cluster_key_file="key")) == b"f" * 32


@pytest.mark.parametrize(
    ("settings", "content", "words"),
    [
        ({}, None, "needs a key that both hosts know: POLYLOGIT_CLUSTER_KEY or cluster_key_file"),
        ({"cluster_key_file": "key"}, None, "cluster_key_file key: cannot be read: No such file or directory"),
        ({"cluster_key_file": "key"}, "\n", "needs a key that both hosts know"),
        ({"cluster_key_file": "key"}, "short", "cluster_key_file key: has 5 characters, at least 32 are needed"),
    ],
)
def test_no_good_key(tmp_path, monkeypatch, settings, content, words):
    monkeypatch.delenv("POLYLOGIT_CLUSTER_KEY", raising=False)
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(StartError, match=words):
        load_key(config(tmp_path, **settings))
