"""Two experts, one of them behind a TCP connection, run by `polylogit expert` as on another host: the same text, also
over a worker that is killed and started again; and every command over it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import demo, processes
from tests.support.lost_expert import EXPERTS, RESTART_SECONDS, Answer, Crowd, Undisturbed, configuration
from tests.support.server_process import POLYLOGIT, Served, serve, until
from tests.support.two_hosts import free_port

AWAY = EXPERTS[-1]
COMMAND_SECONDS = 120.0


class Elsewhere:
    """`polylogit expert FILE text`, with a temporary directory of its own."""

    def __init__(self, file: Path, address: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="elsewhere-"))
        self.errors = self.directory / "stderr"
        self.temporary = self.directory / "tmp"
        self.temporary.mkdir()
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [POLYLOGIT, "expert", file, AWAY, "--listen", address],
                stderr=errors,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def wait_loaded(self) -> None:
        until(lambda: "waiting for a coordinator" in self.text(), limit=RESTART_SECONDS, what="the worker listens")

    def text(self) -> str:
        return self.errors.read_text()

    def worker(self) -> int:
        """The process with the engine."""
        (found,) = (pid for pid in processes.descendants(self.process.pid) if processes.has_mapped(pid, "/vllm/"))
        return found

    def terminate(self) -> None:
        """SIGTERM: it leaves in order, and nothing stays."""
        children = processes.descendants(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.text()
        until(lambda: not any(map(processes.alive, children)), limit=5, what="its processes have ended")
        assert not list(self.temporary.iterdir())

    def clean_up(self) -> None:
        for pid in (*processes.descendants(self.process.pid), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.directory)


class Hosts:
    """The configuration file that both hosts have, and the processes of the other."""

    def __init__(self, directory: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        key = directory / "key"
        key.write_text("0123456789abcdef" * 2 + "\n")
        one_host = configuration("wait")
        self.data: dict[str, Any] = {**one_host, "cluster_key_file": str(key), "http": {"port": 0}}
        self.data["experts"] = [*one_host["experts"][:-1], {**one_host["experts"][-1], "address": self.address}]
        self.file = directory / "polylogit.yaml"
        self.file.write_text(yaml.safe_dump(self.data), encoding="utf-8")
        self.started: list[Elsewhere] = []

    def start(self) -> Elsewhere:
        self.started.append(Elsewhere(self.file, self.address))
        return self.started[-1]

    def run(self, *arguments: str) -> str:
        """What a command prints."""
        done = subprocess.run([POLYLOGIT, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    found = Hosts(tmp_path)
    try:
        yield found
    finally:
        for each in found.started:
            each.clean_up()


def health(server: Served) -> tuple[int, str]:
    response = server.http.get("/health/ready")
    return response.status_code, response.text


def test_a_worker_elsewhere_dies_in_the_middle_and_comes_back(hosts: Hosts, undisturbed: Undisturbed) -> None:
    alone = undisturbed.answer
    there = hosts.start()
    with serve(hosts.data) as server:
        assert f"expert {AWAY}: connected to {hosts.address}" in server.errors()
        answer = Answer(server).read()
        assert (answer.text, answer.weights) == (alone.text, alone.weights)
        crowd = Crowd(server)
        answer = Answer(server).read(40)
        os.kill(there.worker(), signal.SIGKILL)
        assert there.process.wait(30) == 1
        assert f"polylogit: error: expert {AWAY}: ended with exit code -9" in there.text()
        until(lambda: health(server)[0] == 503, limit=10, what="not ready")
        there = hosts.start()
        assert (answer.read().text, answer.reason) == (alone.text, "length")
        assert crowd.texts() == undisturbed.others
        assert server.metrics()[f"polylogit_expert_restarts_total{{expert={AWAY}}}"] == 1
        assert health(server)[0] == 200
        assert "not reached" in hosts.run("check", str(hosts.file))
    there.wait_loaded()
    there.terminate()


def test_the_other_commands(hosts: Hosts, tmp_path: Path) -> None:
    there = hosts.start()
    there.wait_loaded()
    assert f"expert {AWAY}: {hosts.address}: reached, and fits" in hosts.run("check", str(hosts.file))
    short = ["--sequences", "1", "--tokens", "4", "--rounds", "1"]
    assert AWAY in hosts.run("bench", str(hosts.file), "--experts", AWAY, *short)
    prompts = str(demo.DEMO / "prompts" / "test.jsonl")
    recorded = ["--prompts", prompts, "--grader", "exact", "--output", str(tmp_path / "records"), "--policies", AWAY]
    said = hosts.run("record", str(hosts.file), *recorded, "--limit", "2", "--max-tokens", "4")
    assert said.startswith("2 responses -> ")
    there.terminate()
