"""The worker's listener over real TCP, the frames behind it, and the commands of both hosts."""

from __future__ import annotations

import logging
import socket
import struct
import time
from pathlib import Path

import pytest

from server import cli
from server.config import Config, parse_config
from server.errors import StartError, UnreachableError
from server.launch.check import Finding, check, check_remote
from server.launch.expert_host import ExpertHost
from server.launch.sockets import bound
from server.remote import listener as listener_module
from server.remote.agreement import Offer, Terms
from server.remote.dialer import Dialer
from server.remote.listener import Listener
from server.wire.api import Abort, FromApi, GetStats
from server.wire.channel import ConnectedChannel
from tests.support.fake_engine import FakeEngine, FakeModel
from tests.support.paths import DEMO
from tests.support.two_hosts import KEY, Host, free_port, write_models

FACTS = {"list_length": "8"}


def dialer(port: int) -> Dialer:
    return Dialer(f"127.0.0.1:{port}", KEY, Offer(FACTS, Terms(8, "none")))


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_strangers_do_not_keep_the_coordinator_out(caplog):
    """Fifteen that say nothing and one that speaks HTTP; the place stays free."""
    port = free_port()
    with bound("--listen", "127.0.0.1", port) as socket_here, caplog.at_level(logging.WARNING):
        listener = Listener(socket_here, KEY, FACTS, hang_seconds=60)
        listener.open()
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(15)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        peer = dialer(port).dial()
        assert listener.admit() == Terms(8, "none")
        for each in (peer, *strangers):
            each.close()
        until(lambda: listener.receive(0) is not None)  # Stop: it has gone
        until(lambda: "refused 127.0.0.1: does not speak polylogit" in caplog.text)
        listener.close()
        assert listener.admit() is None


def test_a_worker_that_hangs_after_its_coordinator_has_gone_ends(monkeypatch):
    """Its engine does not come back to the socket; only the next coordinator that knocks can see it."""
    codes: list[int] = []
    monkeypatch.setattr(listener_module.os, "_exit", codes.append)
    port = free_port()
    with bound("--listen", "127.0.0.1", port) as socket_here:
        listener = Listener(socket_here, KEY, FACTS, hang_seconds=0.3)
        listener.open()
        first = dialer(port).dial()
        listener.admit()
        for _ in range(2):  # it is there, however long
            with pytest.raises(UnreachableError, match="it serves another coordinator"):
                dialer(port).dial()
            time.sleep(0.4)
        assert not codes
        first.close()

        def knock() -> bool:
            with pytest.raises(UnreachableError, match="it serves another coordinator"):
                dialer(port).dial()
            time.sleep(0.1)
            return bool(codes)

        until(knock)
        listener.close()
    assert codes[0] == 1


@pytest.mark.parametrize(
    "data",
    [struct.pack("<I", 2**32 - 1), struct.pack("<I", 3) + b"\xc1ab", struct.pack("<I", 1) + b"\x07"],
    ids=["long", "rubbish", "other"],
)
def test_a_peer_that_sends_rubbish_is_cut_off(data):
    ours, theirs = socket.socketpair()
    channel: ConnectedChannel = ConnectedChannel(ours, FromApi)
    other: ConnectedChannel = ConnectedChannel(theirs, FromApi)
    other.send(Abort([1]))
    theirs.sendall(data)
    assert channel.receive(5) == Abort([1])
    assert channel.receive(0.05) is None
    assert channel.ended
    channel.send(GetStats())  # nobody is there, and nothing happens
    channel.close()
    other.close()


def test_a_peer_may_send_the_whole_rows_of_a_thousand_sequences():
    ours, theirs = socket.socketpair()
    channel: ConnectedChannel = ConnectedChannel(ours, FromApi)
    theirs.sendall(struct.pack("<I", 1024 * 152_000 * 4) + b"the beginning")
    assert channel.receive(0.05) is None
    assert not channel.ended
    channel.close()
    theirs.close()


# --- the commands ---


def config(directory: Path, port: int, **settings) -> Config:
    write_models(directory)
    (directory / "key").write_bytes(KEY)
    experts = [{"name": "a", "model": "a"}, {"name": "b", "model": "b", "address": f"127.0.0.1:{port}"}]
    data = {"name": "fake", "experts": experts, "cluster_key_file": "key", **settings}
    return parse_config(data, directory=directory)


def test_check_says_of_each_expert_elsewhere_whether_it_was_reached(tmp_path):
    given = config(tmp_path, port := free_port())
    (finding,) = check_remote(given)
    assert finding.warning
    assert str(finding) == f"expert b: warning: not reached: 127.0.0.1:{port}: Connection refused"
    host = Host(FakeEngine(FakeModel(1)), given, 1, port)
    host.start()

    def reached() -> bool:
        return check_remote(given) == [Finding("expert b", f"127.0.0.1:{port}: reached, and fits")]

    until(reached)
    until(reached)  # the worker is free again soon after
    with pytest.raises(StartError, match=r"expert b: .*list_length is 128 at the expert and 3 at the coordinator"):
        check_remote(config(tmp_path, port, list_length=3))
    host.listener.dismiss()
    host.join(5)
    assert not host.is_alive()


def test_an_expert_elsewhere_needs_a_key_and_its_weights_only_there(tmp_path, monkeypatch):
    monkeypatch.delenv("POLYLOGIT_CLUSTER_KEY", raising=False)
    for name in ("math", "text"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / name / file).write_bytes((DEMO / "experts" / name / file).read_bytes())
    (tmp_path / "math" / "model.safetensors").touch()
    experts = [{"name": "math", "model": "math"}, {"name": "text", "model": "text", "address": "10.0.0.2:8100"}]
    data = {"name": "demo", "experts": experts}
    with pytest.raises(StartError, match="needs a key that both hosts know"):
        check(parse_config(data, directory=tmp_path))
    monkeypatch.setenv("POLYLOGIT_CLUSTER_KEY", "k" * 32)
    assert Finding("cluster key", "given") in check(parse_config(data, directory=tmp_path))
    with pytest.raises(StartError, match=r"expert text: .*has no weights"):
        check(parse_config(data, directory=tmp_path), host="10.0.0.2")


@pytest.mark.parametrize(
    ("name", "listen", "words"),
    [
        ("c", "127.0.0.1:8100", "no expert is named 'c' (there are a, b)"),
        ("a", "127.0.0.1:8100", "expert a has no address in the configuration: `polylogit serve` runs it itself"),
        ("b", "8100", "'8100' is not an address such as 10.0.0.2:8100"),
    ],
)
def test_an_expert_that_cannot_be_served_elsewhere(tmp_path, name, listen, words):
    with pytest.raises(StartError) as raised:
        ExpertHost(config(tmp_path, 8100), name, listen)
    assert str(raised.value) == words


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    file = tmp_path / "polylogit.yaml"
    file.write_text("{name: fake, experts: [{name: a, model: a}]}")
    assert cli.main(["expert", str(file), "b", "--listen", "127.0.0.1:8100"]) == 1
    assert capsys.readouterr().err == "polylogit: error: no expert is named 'b' (there are a)\n"
