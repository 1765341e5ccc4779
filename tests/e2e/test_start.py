"""Bad starts: the command ends with exit code 1 and one line that a person can act on."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import demo, gates
from tests.support.server_process import POLYLOGIT

SECONDS = 60


def run(command: str, data: dict[str, Any] | str, directory: Path) -> subprocess.CompletedProcess[str]:
    file = directory / "deployment.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return subprocess.run([POLYLOGIT, command, file], capture_output=True, text=True, timeout=SECONDS)


def expect_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("polylogit: error: ")
    assert "Traceback" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]


def test_a_port_that_is_none(tmp_path: Path) -> None:
    command = [POLYLOGIT, "serve", tmp_path / "any.yaml", "--port", "99999"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("argument --port: 99999 is not a port from 0 to 65535")


def test_a_directory_too_deep_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    expect_one_line(run("serve", {**demo.configuration(), "http": {"port": 0}}, tmp_path), str(deep), "TMPDIR")


@pytest.fixture(params=["check", "serve"])
def command(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return gates.build(
        tmp_path / "gate.pt", experts=demo.EXPERTS, tokenizer=demo.model("math") / "tokenizer.json", top_k=32
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def copied(name: str, directory: Path) -> Path:
    return Path(shutil.copytree(demo.model(name), directory / f"copy-of-{name}"))


def test_a_good_deployment_is_found_good(gate: Path, tmp_path: Path) -> None:
    """Otherwise the faults below show nothing."""
    data = demo.configuration(gate={"file": str(gate)}, policies={"gate": {}}, default_policy="gate", http={"port": 0})
    done = run("check", data, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith("ok")


def test_missing_model(command: str, tmp_path: Path) -> None:
    data = demo.configuration(only={"text": {"model": str(tmp_path / "nowhere")}})
    expect_one_line(run(command, data, tmp_path), "expert text", "nowhere", "no such model directory")


def test_model_without_weights(command: str, tmp_path: Path) -> None:
    model = copied("text", tmp_path)
    (model / "model.safetensors").unlink()
    data = demo.configuration(only={"text": {"model": str(model)}})
    expect_one_line(run(command, data, tmp_path), "expert text", "weights")


def test_vocabularies_that_differ(command: str, tmp_path: Path) -> None:
    model = copied("text", tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    first, second = list(tokens)[:2]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = demo.configuration(only={"text": {"model": str(model)}})
    expect_one_line(run(command, data, tmp_path), "vocabular", "math", "text")


def test_gate_for_other_experts(command: str, tmp_path: Path) -> None:
    gate = gates.build(
        tmp_path / "gate.pt",
        experts=["math", "text", "poetry"],
        tokenizer=demo.model("math") / "tokenizer.json",
        top_k=32,
    )
    expect_one_line(run(command, demo.configuration(gate={"file": str(gate)}), tmp_path), "gate", "experts", "poetry")


def test_a_file_of_before_lists_had_a_length(command: str, tmp_path: Path) -> None:
    expect_one_line(run(command, demo.configuration(top_k=32), tmp_path), "no key 'top_k' any more", "list_length")


def test_gate_with_another_digest(command: str, gate: Path, tmp_path: Path) -> None:
    data = demo.configuration(gate={"file": str(gate), "sha256": "0" * 64})
    expect_one_line(run(command, data, tmp_path), "gate", "sha256")


def test_missing_gate(command: str, tmp_path: Path) -> None:
    expect_one_line(run(command, demo.configuration(gate={"file": "nowhere.pt"}), tmp_path), "gate", "nowhere.pt")


def test_gate_file_cut_short(command: str, gate: Path, tmp_path: Path) -> None:
    gate.write_bytes(gate.read_bytes()[: gate.stat().st_size // 2])
    data = demo.configuration(gate={"file": str(gate)})
    expect_one_line(run(command, data, tmp_path), "gate", "TorchScript")


def test_port_taken(command: str, taken_port: int, tmp_path: Path) -> None:
    data = demo.configuration(http={"port": taken_port})
    expect_one_line(run(command, data, tmp_path), f"127.0.0.1:{taken_port}", "in use")


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("defualt_policy", "uniform", "default_policy"),
        ("limits", {"sequence": 8}, "sequences"),
        ("http", {"prot": 80}, "port"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, value: object, nearest: str, tmp_path: Path) -> None:
    expect_one_line(
        run("check", demo.configuration(**{key: value}), tmp_path), "unknown key", f"did you mean {nearest!r}"
    )


def test_unknown_key_of_an_expert(command: str, tmp_path: Path) -> None:
    data = demo.configuration(only={"math": {"max_modle_len": 64}})
    expect_one_line(run(command, data, tmp_path), "unknown key", "max_modle_len", "did you mean 'max_model_len'")


def test_file_that_is_not_yaml(command: str, tmp_path: Path) -> None:
    expect_one_line(run(command, "name: [demo", tmp_path), "deployment.yaml", "not YAML")


def test_weights_that_cannot_be_loaded(tmp_path: Path) -> None:
    """Found only while loading, between what the engines print; the last line says it, and nothing stays behind."""
    model = copied("text", tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    data = demo.configuration(experts=["text"], only={"text": {"model": str(model)}}, http={"port": 0})
    done = run("serve", data, tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("polylogit: error: ")]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("polylogit: error: expert text: ")
    assert "Traceback" not in done.stderr
