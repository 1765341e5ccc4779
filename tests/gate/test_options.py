"""Command lines made from dataclasses: what they take, refuse and say of themselves."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from gate.errors import GateError
from gate.options import (
    Each,
    Metavar,
    OptionsError,
    Output,
    Positional,
    check_outputs,
    commas,
    fill,
    made,
    names,
    number,
    port,
    run_module,
    whole,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A group."""

    share: Annotated[float, number(0, 1)] = 0.5
    """Of 100%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What others share."""

    config: Annotated[Path, Positional("FILE")]
    """The configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything(Base):
    """One of each kind."""

    more: Annotated[tuple[str, ...], Positional("MORE")] = ()
    """Further files."""
    output: Annotated[Path, Output()]
    """Written,
    in one go."""
    count: Annotated[int, whole(1)] = 3
    """How many."""
    limit: int | None = None
    """Only the first (default: all)."""
    port: Annotated[int, port] = 0
    """Where."""
    space: Literal["logprob", "prob"] = "logprob"
    """Which."""
    sizes: Annotated[tuple[int, ...], commas(whole(1)), Metavar("SIZES")] = (1, 8)
    """Some numbers."""
    policies: Annotated[tuple[str, ...] | None, names] = None
    """Some names (default: all)."""
    models: tuple[str, ...] = ()
    """Which to ask (default: all)."""
    squares: Annotated[tuple[int, ...], Each(lambda text: int(text) ** 2)] = ()
    """Squared (default: none)."""
    once: bool = False
    """One frame."""
    no_hidden: bool = False
    """Leave out hidden states."""
    inner: Inner = field(default_factory=Inner)
    """Fine print."""

    def __post_init__(self) -> None:
        if self.once and self.no_hidden:
            raise OptionsError("--once and --no-hidden do not go together")


def parsed(*arguments: str) -> Everything:
    return made(Everything, vars(parser().parse_args([*arguments])))


def parser() -> argparse.ArgumentParser:
    made_of = argparse.ArgumentParser("test")
    fill(made_of, Everything)
    return made_of


def test_only_what_must_be_given_leaves_the_defaults() -> None:
    assert parsed("a.yaml", "--output", "o") == Everything(config=Path("a.yaml"), output=Path("o"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Places that may be empty."""

    config: Annotated[Path | None, Positional("FILE")] = None
    """A file (default: none)."""
    url: Annotated[str, Positional("URL")] = "http://here"
    """A server."""
    ports: Annotated[tuple[int, ...], Positional("PORT")] = (1, 2)
    """Some."""


@pytest.mark.parametrize("given", [[], ["f"], ["f", "u"], ["f", "u", "3", "4"]])
def test_places_that_may_be_empty(given: list[str]) -> None:
    made_of = argparse.ArgumentParser()
    fill(made_of, Places)
    values = zip(("config", "url"), (Path("f"), "u"), given[:2], strict=False)
    expected = Places(**{name: value for name, value, _ in values}, ports=(3, 4) if given[2:] else (1, 2))
    assert made(Places, vars(made_of.parse_args(given))) == expected


def test_every_kind_of_field() -> None:
    given = ["--count", "7", "--limit", "2", "--port", "80", "--space", "prob", "--sizes", "2,4", "--policies", "a,,b"]
    more = ["--models", "x", "y", "--squares", "2", "3", "--no-hidden", "--share", "1"]
    assert parsed("a.yaml", "b", "c", "--output", "o", *given, *more) == Everything(
        config=Path("a.yaml"),
        more=("b", "c"),
        output=Path("o"),
        count=7,
        limit=2,
        port=80,
        space="prob",
        sizes=(2, 4),
        policies=("a", "b"),
        models=("x", "y"),
        squares=(4, 9),
        no_hidden=True,
        inner=Inner(share=1.0),
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "0"], "argument --count: must be at least 1"),
        (["--count", "x"], "argument --count: 'x' is not a whole number"),
        (["--limit", "1.5"], "argument --limit: '1.5' is not a whole number"),
        (["--share", "nan"], "argument --share: must be from 0 to 1"),
        (["--share", "x"], "argument --share: 'x' is not a number"),
        (["--port", "70000"], "argument --port: 70000 is not a port from 0 to 65535"),
        (["--port", "-1"], "argument --port: -1 is not a port from 0 to 65535"),
        (["--sizes", "1,,2"], "argument --sizes: '' is not a whole number"),
        (["--space", "both"], "argument --space: invalid choice: 'both'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("a.yaml", "--output", "o", *arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_help_is_the_docstrings_and_tells_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = [" ".join(line.split()) for line in parser().format_help().splitlines()]
    for line in (
        "FILE The configuration",
        "MORE Further files",
        "--output PATH Written, in one go (required)",
        "--count N How many (default: 3)",
        "--limit N Only the first (default: all)",
        "--space {logprob,prob}",
        "--sizes SIZES Some numbers (default: 1,8)",
        "--once One frame",
        "--no-hidden Leave out hidden states",
        "Fine print:",
        "--share X Of 100% (default: 0.5)",
    ):
        assert line in lines


def test_outputs_are_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path, "it is a directory"),
        (tmp_path / "file" / "deeper" / "o", f"{tmp_path / 'file'} is not a directory"),
        (tmp_path / ("o" * 300), "File name too long"),
    ):
        with pytest.raises(GateError, match=f"--output: {path} cannot be written: {words}"):
            check_outputs(Everything(config=Path("c"), output=path))
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "folder" / "new"):
        check_outputs(Everything(config=Path("c"), output=path))
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["c", "--output", "o", "--once", "--no-hidden"], 2, "test: error: --once and --no-hidden do not go together"),
        (["c", "--output", "."], 1, "test: error: --output: . cannot be written: it is a directory"),
        (["c", "--output", "o"], 1, "test: error: 3 is too much"),
    ],
)
def test_a_module_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    def run(options: Everything) -> None:
        raise GateError(f"{options.count} is too much")

    with pytest.raises(SystemExit) as ended:
        run_module("test", None, Everything, run, arguments)
    assert ended.value.code == code
    assert capsys.readouterr().err.splitlines()[-1] == words
