"""The command line as a whole: its help, its form of errors, and readers that go away."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import main
from tests.support.demo import DEMO

COMMANDS = ["serve", "expert", "check", "bench", "top", "record", "train", "evaluate", "report", "explain"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_options_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (--\S+)( \S.*?)?(?:  +|\n +)(.+)$", text, re.MULTILINE)
    assert len(options) == text.count("\n  --")
    for name, value, words in options:
        assert not value or "(default: " in words or words.endswith("(required)"), name


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE) == COMMANDS


def test_an_error_is_a_line_or_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "absent.yaml"]) == 1
    assert capsys.readouterr().err.startswith("polylogit: error: absent.yaml: ")
    assert main(["--log-format", "json", "check", "absent.yaml"]) == 1
    line = json.loads(capsys.readouterr().err)
    assert line["level"] == "error" and line["message"].startswith("absent.yaml: ")


def test_a_configured_form_holds_for_what_goes_wrong_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("{name: a, logging: {format: json}, experts: [{name: x, model: absent}]}")
    assert main(["serve", str(file)]) == 1
    assert "absent" in json.loads(capsys.readouterr().err)["message"]
    assert main(["--log-format", "text", "serve", str(file)]) == 1
    assert capsys.readouterr().err.startswith("polylogit: error: ")


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `polylogit check FILE | head -1`."""
    command = [sys.executable, "-m", "server.cli", "check", str(DEMO / "polylogit.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_closed_output_is_no_error() -> None:
    """As in `polylogit check FILE >&-`."""
    command = f"exec {sys.executable} -m server.cli check {DEMO / 'polylogit.yaml'} >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_command_line_imports_nothing_heavy() -> None:
    """It is read by every start, and by `--help`."""
    program = "import sys, server.cli; print([name for name in ('torch', 'vllm', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
