"""Child processes: last words, orderly ends, what is left of them. No engine runs here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from server.errors import EngineError
from server.expert.ranks import meeting
from server.launch.children import Children, spawn
from server.launch.roles import ranks_memory
from server.placement import Placement
from tests.support import children, processes
from tests.support.children import until
from tests.support.paths import ROOT

SECONDS = 20.0


@pytest.mark.parametrize(
    ("run", "words", "code"),
    [
        (children.explain, "the model is not there", 1),
        (children.crash, "ValueError: several words on two lines", 1),
        (partial(children.raise_signal, signal.SIGKILL), "ended with exit code -9", -9),
        (partial(children.raise_signal, signal.SIGTERM), "ended with exit code 0", 0),  # left to the supervisor
    ],
    ids=["reason", "bug", "killed", "signal"],
)
def test_last_words_are_one_line(run, words, code):
    child = spawn("child", run)
    child.process.join(SECONDS)
    assert child.process.exitcode == code
    assert child.last_words() == words
    child.pipe.close()


def test_a_child_that_hangs_is_ended(tmp_path):
    child = spawn("child", partial(children.linger, str(tmp_path / "ready")))
    assert until((tmp_path / "ready").exists)
    child.end()
    assert child.process.exitcode == -signal.SIGKILL
    child.pipe.close()


def test_who_waits_for_a_child_that_takes_long_to_end_leaves_the_processor_to_others(tmp_path):
    child = spawn("child", partial(children.linger_with_closed_files, str(tmp_path / "ready")))
    together = Children([child])
    try:
        assert until((tmp_path / "ready").exists)
        started, waits = time.monotonic(), 0
        while time.monotonic() < started + 0.4:
            together.wait(10.0)
            waits += 1
        assert together.ended() is None
        assert 1 < waits <= 21
    finally:
        together.reap(0.0)
        child.pipe.close()


def test_the_shared_memory_of_an_experts_ranks_goes_with_them(tmp_path):
    """And nobody else's: another expert's, another generation's."""
    places = [Placement(expert, generation, 0, None, []) for expert, generation in ((0, 1), (0, 11), (1, 1))]
    directory = tmp_path / f"polylogit-{os.getpid()}"
    files = [Path("/dev/shm") / f"{meeting(directory, place).name}-tp-[0-1]-cpushm_0" for place in places]
    child = spawn("child", partial(children.linger, str(tmp_path / "ready")))
    try:
        for file in files:
            file.touch()
        replace(child, shared_memory=ranks_memory(directory, places[0])).end()
        assert [file.exists() for file in files] == [False, True, True]
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    child.pipe.close()


def test_a_child_does_not_outlive_its_parent(tmp_path):
    program = (
        "import sys; from functools import partial; from server.launch.children import spawn\n"
        "from tests.support import children\n"
        "child = spawn('child', partial(children.linger, sys.argv[1])); print(child.process.pid, flush=True)\n"
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
        assert until((tmp_path / "ready").exists) and processes.alive(pid)
        parent.kill()
        parent.wait()
        assert until(lambda: not processes.alive(pid))


def test_children_are_watched_and_reaped_together(tmp_path):
    """One ends badly: it is named with its reason. The other is given its time, then killed."""
    family = Children([spawn("lingers", partial(children.linger, str(tmp_path / "ready")))])
    assert until((tmp_path / "ready").exists)
    family.check()
    family.add(spawn("explains", children.explain))
    family.wait(SECONDS)
    assert until(lambda: family.ended() is not None)  # it has let go of its pipes a moment before
    assert [child.name for child in family if not child.process.is_alive()] == ["explains"]
    with pytest.raises(EngineError, match=r"^explains: the model is not there$"):
        family.check(EngineError)
    every = list(family)
    family.reap(0.1)
    assert [child.process.exitcode for child in every] == [-signal.SIGKILL, 1]
    assert not list(family)
