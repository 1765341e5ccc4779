"""A deployment served for the time of a command. No engine runs here."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from server.errors import StartError
from server.launch.served import served
from tests.support import children, processes

SECONDS = 20.0


def serve(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have one of the small targets run in place of the server."""
    monkeypatch.setattr("server.launch.served.run_server", getattr(children, name))


def test_a_server_that_is_ready_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "announces")
    with served(tmp_path / "polylogit.yaml", start_seconds=SECONDS) as url:
        number = int(url.removeprefix("http://127.0.0.1:1/"))
        assert processes.alive(number) and number != os.getpid()
    assert not processes.alive(number)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refuses", "the model is not there"),
        ("crashes", "ValueError: several words on two lines"),
        ("is_killed", "the server ended with exit code -9"),
    ],
)
def test_the_last_words_of_a_server_that_fails_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    serve(monkeypatch, name)
    with pytest.raises(StartError) as raised, served(tmp_path / "polylogit.yaml", start_seconds=SECONDS):
        pass
    assert str(raised.value) == words


def test_a_server_that_is_not_ready_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "loads_for_ever")
    started = time.monotonic()
    with (
        pytest.raises(StartError, match=r"^the server was not ready after 0[.]5 s$"),
        served(tmp_path / "polylogit.yaml", start_seconds=0.5),
    ):
        pass
    assert time.monotonic() - started < children.SECONDS


def test_a_configuration_that_is_wrong_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the server's own process, which writes nothing itself."""
    (tmp_path / "polylogit.yaml").write_text("{name: fake, experts: [{name: a, model: nowhere}]}")
    with pytest.raises(StartError, match=r"^expert a: .*nowhere"), served(tmp_path / "polylogit.yaml"):
        pass
    assert capfd.readouterr() == ("", "")
