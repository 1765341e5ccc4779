"""What `polylogit evaluate` goes on with, and what it and `report` refuse. The deployment is one without models."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gate.evaluation.explain import ExplainedAnswer, Token
from gate.evaluation.results import load_results
from server.cli import main
from server.tools import explain, target
from tests.support import demo
from tests.support.openai_endpoint import cards, endpoint

PROMPTS = '{"id": "1", "domain": "d", "messages": [{"role": "user", "content": "?"}], "answer": "!"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a configuration, its two experts and gates; what is served of it is an endpoint that always says "!"."""
    models = {name: shutil.copytree(demo.model(name), tmp_path / name) for name in ("math", "text")}
    data = demo.configuration(experts=[*models], only={name: {"model": str(path)} for name, path in models.items()})
    gated = {"gate": {"file": "gate.pt"}, "policies": {"gate": {}}, "default_policy": "gate"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**data, **gated}))
    for name in ("gate.pt", "other.pt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)

    @contextlib.contextmanager
    def served(config: Path, *, gate: Path | None = None) -> Iterator[str]:
        with endpoint(cards("demo", "demo:gate", "demo:math"), lambda body: "!") as url:
            yield url

    monkeypatch.setattr(target, "served", served)
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
        file.write("list_length: 4\n")


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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "--prompts", "prompts.jsonl", "--output", "r.json", "--models", "demo:nobody=a"], "--models"),
        (["explain", "--prompt", "?", "--model", "demo:nobody"], "--model"),
    ],
)
def test_a_model_that_the_configuration_does_not_offer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    """Known before anything is served."""
    monkeypatch.setattr(target, "served", None)
    assert main([command[0], "config.yaml", *command[1:]]) == 1
    offered = "(there are demo, demo:gate, demo:math, demo:text)"
    error = capsys.readouterr().err
    assert error == f"polylogit: error: {words}: no model is named 'demo:nobody' {offered}\n"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["evaluate", "config.yaml", "--prompts", "prompts.jsonl"], "--output"),
        (["explain", "config.yaml", "--prompt", "?"], "--html"),
        (["explain", "config.yaml", "--prompt", "?"], "--png"),
        (["report", "prompts.jsonl"], "--markdown"),
        (["report", "prompts.jsonl"], "--plot"),
        (["bench", "config.yaml"], "--json"),
        (["record", "config.yaml", "--prompts", "prompts.jsonl", "--grader", "exact"], "--output"),
        (["train", "config.yaml", "--records", "records"], "--output"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str], option: str
) -> None:
    assert main([*command, option, "gate.pt/deeper/file"]) == 1
    place = "gate.pt/deeper/file cannot be written: "
    assert capsys.readouterr().err.startswith(f"polylogit: error: {option}: {place}")


def test_one_row_has_none_to_be_compared_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--models", "demo:gate=fused") == 0
    capsys.readouterr()
    assert main(["report", "results.json", "--compare", "fused"]) == 1
    assert capsys.readouterr().err == "polylogit: error: no other row to compare 'fused' with\n"


@pytest.mark.parametrize("asked", [["config.yaml"], ["--url", "http://here"]])
def test_an_explanation_needs_no_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    token = Token("!", [1.0, 0.0], {"math": 1.0, "text": 0.0})
    monkeypatch.setattr(explain, "ask", lambda *_: ExplainedAnswer("demo", "?", ["math", "text"], [token]))
    assert main(["explain", *asked, "--prompt", "?"]) == 0
    assert capsys.readouterr().out == f"{'!'!r:14} math  1.00  text  0.00  entropy 0.00\n"


def test_rows_to_compare_with_and_none_to_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate() == 0
    assert main(["report", "results.json", "--against", "nonsense"]) == 1
    assert "--against needs --compare" in capsys.readouterr().err
