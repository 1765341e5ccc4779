"""Processes: last words, orderly ends, restarts and their limits, cores and GPUs. No engine runs here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from server.config import Config, parse_config
from server.errors import StartError
from server.expert.ranks import meeting
from server.launch.supervisor import Supervisor, _url, end, private_directory, spawn
from server.placement import Placement, expert_cpus, expert_gpus
from server.wire.supervisor import ExpertDown
from tests.support import children
from tests.support.paths import ROOT

SECONDS = 20.0


def config(directory: Path = Path(), models=("stays", "stays"), **settings) -> Config:
    experts = [{"name": name, "model": model} for name, model in zip("abcd", models, strict=False)]
    data = {"name": "fake", "experts": experts, "http": {"port": 0}, **settings}
    return parse_config(data, directory=directory)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- one child ---


@pytest.mark.parametrize(
    ("target", "arguments", "words", "code"),
    [
        (children.explain, (), "the model is not there", 1),
        (children.crash, (), "ValueError: several words on two lines", 1),
        (children.raise_signal, (signal.SIGKILL,), "ended with exit code -9", -9),
        (children.raise_signal, (signal.SIGTERM,), "ended with exit code 0", 0),  # left to the supervisor
    ],
    ids=["reason", "bug", "killed", "signal"],
)
def test_last_words_are_one_line(target, arguments, words, code):
    child = spawn("child", target, *arguments)
    child.process.join(SECONDS)
    assert child.process.exitcode == code
    assert child.last_words() == words
    child.pipe.close()


def test_a_child_that_hangs_is_ended(tmp_path):
    child = spawn("child", children.linger, str(tmp_path / "ready"))
    assert until((tmp_path / "ready").exists)
    end(child)
    assert child.process.exitcode == -signal.SIGKILL
    child.pipe.close()


def test_the_shared_memory_of_an_experts_ranks_goes_with_them(tmp_path):
    """And nobody else's: another expert's, another generation's."""
    places = [Placement(expert, generation, 0, None, []) for expert, generation in ((0, 1), (0, 11), (1, 1))]
    names = [meeting(tmp_path / f"polylogit-{os.getpid()}", place).name for place in places]
    files = [Path("/dev/shm") / f"{name}-tp-[0-1]-cpushm_0" for name in names]
    child = spawn("child", children.linger, str(tmp_path / "ready"))
    try:
        for file in files:
            file.touch()
        end(replace(child, meeting=names[0]))
        assert [file.exists() for file in files] == [False, True, True]
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    child.pipe.close()


def test_a_child_does_not_outlive_its_parent(tmp_path):
    program = (
        "import sys; from server.launch.supervisor import spawn; from tests.support import children\n"
        "child = spawn('child', children.linger, sys.argv[1]); print(child.process.pid, flush=True)\n"
        "child.process.join()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "ready")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert until((tmp_path / "ready").exists) and alive(pid)
        parent.kill()
        parent.wait()
        assert until(lambda: not alive(pid))


def test_the_private_directory_is_private_and_goes():
    with pytest.raises(RuntimeError), private_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "socket").touch()
        raise RuntimeError
    assert not directory.exists()


# --- cores and GPUs ---


@pytest.mark.parametrize(
    ("cores", "experts", "expected"),
    [
        (range(8), [{}, {}], [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (range(3), [{}, {}], [[0, 2], [1]]),
        ([4, 9], [{}, {}, {}], [[4], [9], [4]]),
        (range(4), [{"cpus": [3]}, {}, {"device": "cuda"}], [[3], [0, 1, 2], None]),
        ([0], [{"device": "cuda"}], [None]),
    ],
)
def test_cpu_experts_share_the_cores_of_this_process(monkeypatch, cores, experts, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
    named = [{"name": f"e{index}", "model": "m", **fields} for index, fields in enumerate(experts)]
    given = parse_config({"name": "fake", "experts": named}, directory=Path())
    assert expert_cpus(given) == expected


def test_gpu_experts_take_the_next_free_ones():
    fields = [
        {"device": "cuda"},
        {"device": "cuda", "gpus": [1, 0], "tensor_parallel_size": 2},
        {},
        {"device": "cuda", "tensor_parallel_size": 2},
    ]
    experts = [{"name": f"e{index}", "model": "m", **each} for index, each in enumerate(fields)]
    given = parse_config({"name": "fake", "experts": experts}, directory=Path())
    assert expert_gpus(given) == [[2], [1, 0], [], [3, 4]]


def test_every_host_has_cores_and_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    there, elsewhere = {"address": "10.0.0.2:8100"}, {"address": "10.0.0.3:8100"}
    fields = [{}, {"device": "cuda"}, {}, there, there | {"device": "cuda"}, elsewhere | {"device": "cuda"}]
    fields[4] |= {"tensor_parallel_size": 2, "address": "10.0.0.2:8101"}
    experts = [{"name": f"e{index}", "model": "m", **each} for index, each in enumerate(fields)]
    given = parse_config({"name": "fake", "experts": experts}, directory=Path())
    assert expert_cpus(given) == [[0, 2], None, [1, 3], [0, 1, 2, 3], None, None]
    assert expert_gpus(given) == [[], [0], [], [], [0, 1], [0]]


# --- a deployment ---


@pytest.fixture
def _children(monkeypatch) -> Iterator[None]:
    """Small targets for the real processes; signal handlers as they were, afterwards."""
    for name in ("coordinator", "api", "expert"):
        monkeypatch.setattr(f"server.launch.supervisor.run_{name}", getattr(children, name))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def heard(directory: Path) -> list[str]:
    path = directory / "heard.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.fixture
def earlier() -> set[int]:
    """Children of this process that other tests left running, such as shared deployments."""
    return {child.pid for child in multiprocessing.active_children()}


def everything_ended(directory: Path, earlier: set[int]) -> bool:
    """No expert that wrote its number runs any more, nor any other child that this process has started since."""
    pids = [int(path.read_text()) for path in directory.glob("*.pid")]
    since = {child.pid for child in multiprocessing.active_children()} - earlier
    return not since and not any(alive(pid) for pid in pids)


@pytest.mark.usefixtures("_children")
def test_a_life_with_two_restarts_and_an_orderly_end(tmp_path, earlier):
    """Expert b dies, expert a hangs; both come back; then SIGTERM: drain, stop, reap."""
    given = config(tmp_path, ("stays", "once"), example_prompt="restart a", limits={"grace_seconds": 3})
    urls, stoppers = [], []

    def on_ready(url: str) -> None:
        def stop_when_restarted() -> None:
            until(lambda: all((tmp_path / f"{name}-1.pid").exists() for name in "ab"))
            os.kill(os.getpid(), signal.SIGTERM)

        urls.append(url)
        stoppers.append(threading.Thread(target=stop_when_restarted))
        stoppers[0].start()

    Supervisor(given, on_ready).run()
    stoppers[0].join()
    said = heard(tmp_path)
    assert urls[0].startswith("http://127.0.0.1:") and not urls[0].endswith(":0")
    assert said[:2] == ["ExpertUp(expert=0, generation=0)", "ExpertUp(expert=1, generation=0)"]
    assert "ExpertDown(expert=0, generation=0, message='ended with exit code -9')" in said
    assert "ExpertDown(expert=1, generation=0, message='CUDA error')" in said
    assert said.index("ExpertUp(expert=1, generation=1)") > said.index(
        "ExpertDown(expert=1, generation=0, message='CUDA error')"
    )
    assert said[-2:] == ["Drain(grace_seconds=3.0)", "Stop()"]
    assert sorted(said[2:-2])[-2:] == ["ExpertUp(expert=0, generation=1)", "ExpertUp(expert=1, generation=1)"]
    assert everything_ended(tmp_path, earlier)


@pytest.mark.parametrize(
    ("models", "settings", "words"),
    [
        (("stays", "at-once"), {"example_prompt": "never ready"}, "expert b: out of memory"),
        (("stays", "stays"), {"example_prompt": "coordinator dies"}, "coordinator: the experts' vocabularies differ"),
        (
            ("stays", "always"),
            {"limits": {"restarts_per_hour": 1}},
            "expert b: CUDA error; restarted 1 times in an hour, giving up",
        ),
        (
            ("stays", "stays"),
            {"example_prompt": "never ready", "limits": {"start_seconds": 1.0}},
            r"not ready after 1 s \(limits.start_seconds\)",
        ),
    ],
    ids=["expert", "coordinator", "restarts", "time"],
)
@pytest.mark.usefixtures("_children")
def test_what_cannot_go_on_ends_with_one_line_and_leaves_nothing(tmp_path, models, settings, words, earlier):
    supervisor = Supervisor(config(tmp_path, models, **settings), lambda url: None)
    with pytest.raises(StartError, match=f"^{words}$"):
        supervisor.run()
    assert until(lambda: everything_ended(tmp_path, earlier))
    assert not supervisor._directory.exists()


@pytest.mark.usefixtures("_children")
def test_an_expert_on_another_host_is_not_started_here(tmp_path, earlier):
    given = config(tmp_path, example_prompt="unreachable", limits={"start_seconds": 2.0})
    away = msgspec.structs.replace(given.experts[1], address="10.0.0.2:8100")
    given = msgspec.structs.replace(given, experts=[given.experts[0], away])
    with pytest.raises(StartError, match=r"expert b: 10[.]0[.]0[.]2:8100: Connection refused"):
        Supervisor(given, lambda url: None).run()
    assert [path.name for path in tmp_path.glob("*.pid")] == ["a-0.pid"]
    assert "ExpertUp(expert=0, generation=0)" in heard(tmp_path) and not any(
        "expert=1" in line for line in heard(tmp_path)
    )
    assert until(lambda: everything_ended(tmp_path, earlier))


def test_the_url_of_an_ipv6_address_has_brackets():
    assert (_url("127.0.0.1", 80), _url("::1", 80)) == ("http://127.0.0.1:80", "http://[::1]:80")


def test_a_port_that_is_taken(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            Supervisor(config(tmp_path, http={"port": port}), lambda url: None).run()


def test_an_expert_that_dies_again_waits_longer_each_time(monkeypatch):
    """0, 1, 3, 7, 15, 30 and 30 s; what is more than an hour ago does not count."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("server.launch.supervisor.time.monotonic", lambda: clock.now)
    supervisor = Supervisor(config(limits={"restarts_per_hour": 7}), lambda url: None)
    sent: list[object] = []
    supervisor._control = SimpleNamespace(send=sent.append)
    supervisor._ready = True

    def delay() -> float:
        process = SimpleNamespace(kill=lambda: None, join=lambda: None)
        child = SimpleNamespace(name="expert a", process=process, last_words=lambda: "gone", meeting="", output=None)
        supervisor._experts[0] = [child]
        supervisor._bury_expert(0, child)
        return supervisor._restart_at.pop(0) - clock.now

    assert [delay() for _ in range(7)] == [0, 1, 3, 7, 15, 30, 30]
    assert sent == [ExpertDown(0, 0, "gone")] * 7
    with pytest.raises(StartError, match="restarted 7 times in an hour, giving up"):
        delay()
    clock.now += 3601
    assert delay() == 0
