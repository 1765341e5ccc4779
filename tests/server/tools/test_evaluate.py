"""What `polylogit evaluate` goes on with, and what it and `report` refuse. The deployment is one without models."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gate.evaluation.evaluate import load_results
from server.cli import main
from server.launch import served as serving
from tests.support import demo
from tests.support.endpoint import cards, endpoint

PROMPTS = '{"id": "1", "domain": "d", "messages": [{"role": "user", "content": "?"}], "answer": "!"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a configuration, its two experts and gates; what is served of it is an endpoint that always says "!"."""
    models = {name: shutil.copytree(demo.model(name), tmp_path / name) for name in ("math", "text")}
    data = demo.configuration(experts=[*models], only={name: {"model": str(path)} for name, path in models.items()})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**data, "gate": {"file": "gate.pt"}}))
    for name in ("gate.pt", "other.pt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)

    @contextlib.contextmanager
    def served(config: Path, *, gate: Path | None = None) -> Iterator[str]:
        with endpoint(cards("demo", "demo:gate", "demo:math"), lambda body: "!") as url:
            yield url

    monkeypatch.setattr(serving, "served", served)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*more: str) -> int:
    return main(["evaluate", "config.yaml", "--prompts", "prompts.jsonl", "--output", "results.json", *more])


def replace_weights(folder: Path) -> None:
    [weights] = (folder / "text").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)


def replace_gate(folder: Path) -> None:
    (folder / "gate.pt").write_text("trained again")


def append_to_config(folder: Path) -> None:
    with (folder / "config.yaml").open("a") as file:
        file.write("top_k: 4\n")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "more", "named"),
    [
        (nothing, ["--max-tokens", "9"], "max_tokens"),
        (nothing, ["--gate", "other.pt"], "gate"),
        (replace_gate, [], "gate"),
        (append_to_config, [], "config"),
        (replace_weights, [], "experts"),
    ],
)
def test_answers_of_other_settings_are_not_taken_up(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    more: list[str],
    named: str,
) -> None:
    """Else the table would show the old gate's answers under the new one's name."""
    assert evaluate("--models", "demo:gate") == 0
    capsys.readouterr()
    assert evaluate() == 0
    assert [*load_results(folder / "results.json").models] == ["demo:gate", "demo:math"]
    capsys.readouterr()
    change(folder)
    assert evaluate(*more) == 1
    assert f"results.json holds answers with another {named}; move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--concurrency", "0"],
        ["evaluate", "--limit", "0"],
        ["evaluate", "--max-tokens", "-1"],
        ["explain", "--max-tokens", "0"],
    ],
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{arguments[1]}: must be at least 1" in capsys.readouterr().err


def test_rows_to_compare_with_and_none_to_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    assert main(["report", "results.json", "--against", "nonsense"]) == 1
    assert "--against needs --compare" in capsys.readouterr().err
