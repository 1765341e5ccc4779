"""`polylogit check` over copies of the demo's experts, each with one thing wrong."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pynvml
import pytest

from gate.contract import CONTRACT_ENTRY, Contract, encode_contract, vocabulary_hash
from gate.files import sha256_file
from server.config import Config, load_config, parse_config
from server.errors import StartError
from server.launch.check import check, check_port, gpu_count
from tests.support.paths import DEMO

NAMES = ["math", "text", "chat"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copies of the demo's experts, with empty files for the weights: nothing may load them."""
    for name in NAMES:
        source, target = DEMO / "experts" / name, tmp_path / name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        (target / "model.safetensors").touch()
    return tmp_path


def config(folder: Path, *, expert: dict | None = None, **settings) -> Config:
    """Three experts; `expert` changes the second."""
    experts = [{"name": name, "model": name} for name in NAMES]
    experts[1] |= expert or {}
    return parse_config({"name": "demo", "experts": experts, **settings}, directory=folder)


def lines(given: Config, host: str | None = None) -> list[str]:
    """What is found, as it is printed."""
    return [str(finding) for finding in check(given, host)]


def warnings(given: Config, host: str | None = None) -> list[str]:
    return [str(finding) for finding in check(given, host) if finding.warning]


def problem(given: Config) -> str:
    with pytest.raises(StartError) as raised:
        check(given)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file; None takes one out."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_the_demo_is_right():
    found = lines(load_config(DEMO / "polylogit.yaml"))
    assert [line.split(":")[0] for line in found[:3]] == [f"expert {name}" for name in NAMES]
    assert any(line.startswith("vocabulary: the same in all experts") for line in found)
    assert "devices: no conflicts" in found
    assert any(line.startswith("gate: ") for line in found)


def test_every_expert_is_described(folder):
    found = lines(config(folder))
    facts = json.loads((folder / "text" / "config.json").read_text())
    assert (
        f"expert text: {facts['architectures'][0]}, vocabulary {facts['vocab_size']},"
        f" context {facts['max_position_embeddings']}"
    ) in found
    assert found[-1] == "gate: none"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: shutil.rmtree(text), "no such model directory"),
        (lambda text: (text / "config.json").unlink(), "has no config.json"),
        (lambda text: (text / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda text: (text / "config.json").write_text("[]"), "must be a JSON object"),
        (lambda text: edit(text / "config.json", vocab_size=None), "vocab_size is missing"),
        (lambda text: edit(text / "config.json", hidden_size="128"), "hidden_size is missing or not a positive"),
        (lambda text: (text / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda text: (text / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda text: (text / "model.safetensors").unlink(), "has no weights"),
    ],
)
def test_a_damaged_model_is_named(folder, damage, words):
    damage(folder / "text")
    message = problem(config(folder))
    assert message.startswith("expert text: ") and words in message


def test_different_vocabularies_cannot_be_fused(folder):
    path = folder / "chat" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = tokenizer["added_tokens"]
    added[0]["content"], added[1]["content"] = added[1]["content"], added[0]["content"]
    path.write_text(json.dumps(tokenizer))
    message = problem(config(folder))
    assert "experts math and chat have different vocabularies" in message
    assert vocabulary_hash(folder / "math" / "tokenizer.json")[:12] in message


def test_different_sizes_of_one_vocabulary(folder):
    edit(folder / "text" / "config.json", vocab_size=300)
    message = problem(config(folder))
    assert "vocab_size differs" in message and "text: 300" in message


def test_a_context_longer_than_the_models(folder):
    message = problem(config(folder, expert={"max_model_len": 5000}))
    assert message.startswith("expert text: max_model_len 5000 exceeds the model's ")
    limit = json.loads((folder / "text" / "config.json").read_text())["max_position_embeddings"]
    assert check(config(folder, expert={"max_model_len": limit}))


def test_a_chat_template_that_is_not_there(folder):
    assert (
        problem(config(folder, expert={"chat_template": "own.jinja"})) == "expert text: no chat template at own.jinja"
    )
    (folder / "own.jinja").touch()
    assert check(config(folder, expert={"chat_template": "own.jinja"}))


def test_two_experts_on_one_gpu(folder):
    experts = [
        {"name": "math", "model": "math", "device": "cuda", "gpus": [0, 1], "tensor_parallel_size": 2},
        {"name": "text", "model": "text", "device": "cuda", "gpus": [1]},
    ]
    given = parse_config({"name": "demo", "experts": experts}, directory=folder)
    assert problem(given) == "expert text: gpus: 1 is also expert math's"


class Driver:
    """Where `count` GPUs are, in place of NVIDIA's library; None: the kernel module does not answer."""

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.open = 0

    def nvmlInit(self) -> None:
        if self.count is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        self.open += 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.open and self.count is not None
        return self.count

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def install(self, monkeypatch) -> None:
        for name in ("nvmlInit", "nvmlDeviceGetCount", "nvmlShutdown"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))


def on_gpus(folder: Path) -> Config:
    """Two experts on GPUs here, math on 2 and text on the next free ones; a third elsewhere."""
    experts = [
        {"name": "math", "model": "math", "device": "cuda", "gpus": [2]},
        {"name": "text", "model": "text", "device": "cuda", "tensor_parallel_size": 2},
        {"name": "chat", "model": "chat", "device": "cuda", "gpus": [7], "address": "10.0.0.2:8100"},
    ]
    (folder / "key").write_text("k" * 64)
    data = {"name": "demo", "experts": experts, "cluster_key_file": "key"}
    return parse_config(data, directory=folder)


@pytest.mark.parametrize(
    ("count", "host", "found"),
    [
        (3, None, "gpus: 3 of 3"),
        (8, "10.0.0.2", "gpus: 1 of 8"),
        (2, None, "expert math: gpus: there is no GPU 2 (found: 2)"),
        (1, None, "expert text: gpus: there is no GPU 1 (found: 1)"),
        (3, "10.0.0.2", "expert chat: gpus: there is no GPU 7 (found: 3)"),
        (None, None, "gpus: warning: cannot see any GPU driver: those of math, text not checked"),
    ],
)
def test_gpus_are_counted(folder, monkeypatch, count, host, found):
    """Those of the host that this is; also those that an expert takes without naming them."""
    driver = Driver(count)
    driver.install(monkeypatch)
    if found.startswith("expert"):
        with pytest.raises(StartError) as raised:
            check(on_gpus(folder), host)
        assert str(raised.value) == found
    else:
        assert found in lines(on_gpus(folder), host)
        assert warnings(on_gpus(folder), host) == ([found] if count is None else [])
    assert not driver.open


@pytest.mark.skipif(gpu_count() is not None, reason="this machine has a GPU driver")
def test_a_host_without_a_driver(folder):
    """Nothing in place of the driver's library: there is none."""
    assert warnings(on_gpus(folder)) == ["gpus: warning: cannot see any GPU driver: those of math, text not checked"]
    assert not [line for line in lines(config(folder)) if line.startswith("gpus")]


def test_a_core_that_is_not_there(folder):
    absent = max(os.sched_getaffinity(0)) + 1
    assert problem(config(folder, expert={"cpus": [absent]})) == f"expert text: cpus: this process has no core {absent}"


# --- the gate ---


def gate(folder: Path, **changes) -> Path:
    """An archive with nothing but a contract, which is all that `check` may read."""
    hidden = json.loads((folder / "math" / "config.json").read_text())["hidden_size"]
    contract = {
        "format_version": 1,
        "experts": NAMES,
        "vocabulary_hash": vocabulary_hash(folder / "math" / "tokenizer.json"),
        "top_k": 32,
        "space": "logprob",
        "inputs": ["topk", "hidden"],
        "hidden_sizes": [hidden] * 3,
        "projected_size": 4,
        "state_size": 0,
    }
    path = folder / "gate.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"gate/extra/{CONTRACT_ENTRY}", encode_contract(Contract(**(contract | changes))))
    return path


def gated(folder: Path, **fields) -> Config:
    policies = {"gate": {}}
    return config(folder, gate={"file": "gate.pt", **fields}, policies=policies, default_policy="gate")


def test_a_gate_that_fits(folder):
    path = gate(folder)
    assert lines(gated(folder))[-2:] == [
        "gate: fits (logprob space, inputs topk and hidden)",
        "gate: warning: sha256 not pinned, and TorchScript is code",
    ]
    assert warnings(gated(folder)) == ["gate: warning: sha256 not pinned, and TorchScript is code"]
    pinned = gated(folder, sha256=sha256_file(path))
    assert lines(pinned)[-1] == "gate: fits (logprob space, inputs topk and hidden; sha256 pinned)"
    assert not warnings(pinned)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"experts": ["text", "math", "chat"]}, "experts"),
        ({"experts": ["math", "text", "code"]}, "experts"),
        ({"vocabulary_hash": "0" * 64}, "vocabulary_hash"),
        ({"hidden_sizes": [128, 64, 128]}, "hidden_sizes"),
    ],
)
def test_a_gate_for_another_deployment_names_the_field(folder, changes, field):
    gate(folder, **changes)
    message = problem(gated(folder))
    assert message.startswith("gate: /") and f"/gate.pt: {field}: the gate expects " in message
    assert ";" not in message


def test_a_gate_that_differs_in_several_ways_names_them_all(folder):
    gate(folder, experts=["math", "text", "code"], vocabulary_hash="0" * 64)
    message = problem(gated(folder))
    assert "experts: the gate expects " in message and "; vocabulary_hash: " in message


@pytest.mark.parametrize("top_k", [1, 200, 264])
def test_a_gate_reads_lists_of_its_own_length(folder, top_k):
    gate(folder, top_k=top_k)
    assert lines(gated(folder))[-2].startswith("gate: fits")


def test_a_gate_cannot_read_more_than_the_vocabulary(folder):
    gate(folder, top_k=265)
    assert problem(gated(folder)).endswith("top_k: the gate reads 265 tokens of each expert, which has 264")


def test_a_gate_that_is_not_the_pinned_one(folder):
    path = gate(folder)
    message = problem(gated(folder, sha256="0" * 64))
    assert message == f"gate: {path} has sha256 {sha256_file(path)}, expected {'0' * 64}"


def test_a_gate_that_is_cut_off_or_is_none(folder):
    path = gate(folder)
    path.write_bytes(path.read_bytes()[:-40])
    assert "not a readable TorchScript archive" in problem(gated(folder))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gate/data.pkl", b"")
    assert "not a gate checkpoint" in problem(gated(folder))
    path.unlink()
    assert "no gate checkpoint at" in problem(gated(folder))


def test_a_port_that_is_taken(folder):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}"):
            check_port(config(folder, http={"port": port}))
    check_port(config(folder, http={"port": 0}))
