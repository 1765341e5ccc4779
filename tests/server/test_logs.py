"""Log lines, for people and as JSON, and what a process writes past `logging`."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os

import pytest

from server import logs
from server.config import LoggingConfig
from server.launch.children import spawn
from tests.support import children


def line_of(capsys: pytest.CaptureFixture[str], **settings: str) -> str:
    """What one line of a request looks like."""
    logs.configure(LoggingConfig(**settings), "api")
    token = logs.REQUEST_ID.set("r-1")
    try:
        logging.getLogger("polylogit.api").info("two\nlines %d", 2, extra=logs.fields(seconds=0.5, model=None))
    finally:
        logs.REQUEST_ID.reset(token)
    return capsys.readouterr().err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    written = line_of(capsys, format="json")
    assert written.count("\n") == 1
    line = json.loads(written)
    assert line.pop("time").endswith("Z")
    assert line == {
        **{"level": "info", "process": "api", "logger": "polylogit.api", "message": "two\nlines 2"},
        **{"request_id": "r-1", "seconds": 0.5},
    }


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, format="text").endswith(" INFO api: two\nlines 2 request_id=r-1 seconds=0.5\n")


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(capsys, level="warning") == ""
    logs.configure(LoggingConfig(level="debug"), "api")
    logging.getLogger("numba").info("a library's chatter")
    assert capsys.readouterr().err == ""


def test_exception_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LoggingConfig(format="json"), "api")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("polylogit").exception("failed")
    assert json.loads(capsys.readouterr().err)["exception"].endswith("ValueError: no")


def test_whatever_a_process_writes_becomes_json(capfd: pytest.CaptureFixture[str]) -> None:
    """Its own lines as they are; those of C++, of `print`, and the last of a process that dies, wrapped."""
    child = spawn("expert a", children.write_and_abort, capture=True)
    child.process.join(children.SECONDS)
    assert child.output is not None
    child.output.join(children.SECONDS)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["a line", "printed", "from C", "unfinished"]
    assert {line["process"] for line in lines} == {"expert a"}


def test_a_process_goes_on_when_nobody_reads_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def closed(_: int, line: bytes) -> int:
        tried.append(line)
        raise BrokenPipeError

    source, output = multiprocessing.Pipe(duplex=False)
    with output, os.fdopen(os.dup(output.fileno()), "wb") as lines:
        lines.write(b"{}\n{}\n")
    monkeypatch.setattr(logs.os, "write", closed)
    logs.relay(source, "api").join(children.SECONDS)
    assert tried == [b"{}\n", b"{}\n"]
