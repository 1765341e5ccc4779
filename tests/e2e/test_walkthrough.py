"""docs/gate.md: every command of its walk-through, with two of the demo's experts as the models."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from gate.contract import read_contract
from gate.evaluation.results import load_results
from tests.support import demo
from tests.support.paths import ROOT
from tests.support.server_process import POLYLOGIT

GUIDE = ROOT / "docs" / "gate.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
SECONDS = 240


def rows(domains: tuple[str, ...], file: str, count: int) -> list[str]:
    """`count` lines of each of the domains in one of the demo's prompts files."""
    lines = (demo.DEMO / "prompts" / file).read_text(encoding="utf-8").splitlines()
    return [line for name in domains for line in [line for line in lines if json.loads(line)["domain"] == name][:count]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the reader stands: models, prompts to train on and prompts to judge by."""
    (tmp_path / "models").mkdir()
    for name, expert in (("first", "math"), ("second", "text")):
        (tmp_path / "models" / name).symlink_to(demo.model(expert))
    for name, source, count in (("prompts.jsonl", "train.jsonl", 16), ("held-out.jsonl", "test.jsonl", 4)):
        (tmp_path / name).write_text("\n".join(rows(("math", "text", "mixed"), source, count)) + "\n")
    return tmp_path


def run(command: str, folder: Path) -> str:
    """What a command printed on stdout; it must end with 0."""
    arguments = shlex.split(command)
    assert arguments[0] == "polylogit"
    if arguments[1] == "serve":
        return serve_until_ready([*arguments[1:], "--port", "0"], folder)
    if arguments[1] == "train":
        arguments += ["--updates", "200"]  # instead of a thousand, which teach these few responses no more
    done = subprocess.run(
        [POLYLOGIT, *arguments[1:]], cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def serve_until_ready(arguments: list[str], folder: Path) -> str:
    """The line that says where it answers; it is stopped as its user would."""
    process = subprocess.Popen([POLYLOGIT, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        return line
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.timeout(600)
def test_every_command_of_the_walk_through(folder: Path) -> None:
    printed: dict[str, str] = {}
    text = GUIDE.read_text(encoding="utf-8").partition("## Graders")[0]
    for language, title, body in BLOCK.findall(text):
        if language == "yaml":
            with (folder / title.removesuffix(" (appended)")).open("a" if "appended" in title else "w") as file:
                file.write(body)
        if language == "json":
            assert all("messages" in json.loads(line) for line in body.splitlines())
        if language == "sh":
            printed |= {command: run(command, folder) for command in body.splitlines()}
    assert [command.split()[1] for command in printed] == [
        "check",
        "record",
        "train",
        "train",
        "serve",
        "evaluate",
        "report",
    ]
    assert "is ready on" in printed["polylogit serve polylogit.yaml"]
    assert read_contract(folder / "refined.pt").experts == ["first", "second"]
    results = load_results(folder / "results.json")
    assert {*results.models} == {"mine:gate", "mine:uniform", "mine:first", "mine:second"}
    assert (folder / "gate.training" / "curves.png").stat().st_size > 1000
    assert not (folder / "refined.training" / "state.pt").exists()
