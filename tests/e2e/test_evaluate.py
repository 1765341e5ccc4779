"""`polylogit evaluate`, `report` and `explain` over the demo. test_walkthrough has one over a configuration file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gate.evaluation.results import load_results
from server.cli import main
from server.errors import StartError
from server.launch.served import served
from tests.support import demo
from tests.support.server_process import Served

MODELS = ["polylogit-demo:math=math", "polylogit-demo:gate=gate"]


@pytest.fixture
def url(demo_server: Served) -> str:
    return demo_server.url


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three held-out prompts each of sums and of sums with a word."""
    lines = (demo.DEMO / "prompts" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [[line for line in lines if json.loads(line)["domain"] == name][:3] for name in ("math", "mixed")]
    path = tmp_path_factory.mktemp("prompts") / "test.jsonl"
    path.write_text("\n".join(line for part in chosen for line in part) + "\n", encoding="utf-8")
    return path


def run_evaluate(url: str, prompts: Path, output: Path, *models: str) -> int:
    command = ["evaluate", "--url", url, "--prompts", str(prompts), "--output", str(output), "--max-tokens", "24"]
    return main([*command, "--models", *models])


def test_answers_are_graded_kept_and_tabulated(
    url: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    assert run_evaluate(url, prompts, output, MODELS[0]) == 0
    assert run_evaluate(url, prompts, output, *MODELS) == 0  # goes on with the second model only
    results = load_results(output)
    assert results.models["gate"].right == [1] * 6
    assert results.models["math"].right == [1, 1, 1, 0, 0, 0]
    assert all("," in text for text in results.models["gate"].texts[3:])
    table = tmp_path / "table.md"
    plot = tmp_path / "table.png"
    command = ["report", str(output), "--compare", "gate", "--markdown", str(table), "--plot", str(plot)]
    assert main(command) == 0
    assert "| mixed | math | +1.000 [-0.42, +1.00] |" in table.read_text(encoding="utf-8")
    assert plot.stat().st_size > 1000


def test_an_unknown_model_is_one_line(
    url: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluate(url, prompts, tmp_path / "r.json", "polylogit-demo:nobody") == 1
    assert "polylogit-demo:nobody" in capsys.readouterr().err.splitlines()[-1]


def test_explain_shows_which_expert_chose_which_token(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, image = tmp_path / "a.html", tmp_path / "a.png"
    prompt = "Add 27 and 58, then reverse stone."
    assert main(["explain", "--url", url, "--prompt", prompt, "--html", str(page), "--png", str(image)]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("'8' ")
    assert last.startswith("'<|end|>'")
    assert prompt in page.read_text(encoding="utf-8")
    assert image.stat().st_size > 1000


def test_a_deployment_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match="no gate checkpoint"),
        served(demo.DEMO / "polylogit.yaml", gate=tmp_path / "none.pt"),
    ):
        pass
