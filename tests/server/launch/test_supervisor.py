"""A deployment's life: restarts and their limits, orderly ends. No engine runs here."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import msgspec
import pytest

from server.errors import StartError
from server.launch.supervisor import Supervisor
from tests.support.children import config, everything_ended, until


def heard(directory: Path) -> list[str]:
    path = directory / "heard.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.usefixtures("small_processes")
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
            "expert b: CUDA error; restarted once in an hour, giving up",
        ),
        (
            ("stays", "stays"),
            {"example_prompt": "never ready", "limits": {"start_seconds": 1.0}},
            r"not ready after 1 s \(limits.start_seconds\)",
        ),
    ],
    ids=["expert", "coordinator", "restarts", "time"],
)
@pytest.mark.usefixtures("small_processes")
def test_what_cannot_go_on_ends_with_one_line_and_leaves_nothing(tmp_path, temporary, models, settings, words, earlier):
    with pytest.raises(StartError, match=f"^{words}$"):
        Supervisor(config(tmp_path, models, **settings), lambda url: None).run()
    assert until(lambda: everything_ended(tmp_path, earlier))
    assert not list(temporary.iterdir())


@pytest.mark.usefixtures("small_processes")
def test_an_expert_on_another_host_is_not_started_here(tmp_path, earlier):
    given = config(tmp_path, example_prompt="unreachable", limits={"start_seconds": 6.0})
    away = msgspec.structs.replace(given.experts[1], address="10.0.0.2:8100")
    given = msgspec.structs.replace(given, experts=[given.experts[0], away])
    with pytest.raises(StartError, match=r"expert b: 10[.]0[.]0[.]2:8100: Connection refused"):
        Supervisor(given, lambda url: None).run()
    assert [path.name for path in tmp_path.glob("*.pid")] == ["a-0.pid"]
    assert "ExpertUp(expert=0, generation=0)" in heard(tmp_path) and not any(
        "expert=1" in line for line in heard(tmp_path)
    )
    assert until(lambda: everything_ended(tmp_path, earlier))


def test_a_port_that_is_taken(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            Supervisor(config(tmp_path, http={"port": port}), lambda url: None).run()
