"""What two hosts compare before they work together, over the demo's real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from gate.contract import read_contract
from gate.training.recording_gate import uniform_gate, wrap
from server.config import Config, GateConfig, parse_config
from server.errors import StartError
from server.expert.process import projector
from server.remote.agreement import Terms, compare, facts, offer, terms
from tests.support import gates
from tests.support.paths import DEMO

NAMES = ["math", "text"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in NAMES:
        shutil.copytree(DEMO / "experts" / name, tmp_path / name)
    experts = [{"name": name, "model": name, "address": f"10.0.0.2:{8100 + i}"} for i, name in enumerate(NAMES)]
    return parse_config({"name": "demo", "experts": experts}, directory=tmp_path)


def disagreement(coordinators: Config, experts: dict[str, str]) -> str:
    verdict = compare(offer(coordinators, "math").facts, experts)
    assert verdict.final == bool(verdict.reason)
    return verdict.reason


def test_the_same_files_and_configuration_agree(config):
    assert disagreement(config, facts(config, "math")) == ""


def test_what_the_coordinator_decides_alone_may_differ(config):
    """`polylogit bench` uses some of the experts, and no gate."""
    there = facts(config, "math")
    here = msgspec.structs.replace(config, experts=config.experts[:1], default_policy="math")
    assert disagreement(here, there) == ""
    assert offer(here, "math").terms == Terms(128, "none")


@pytest.mark.parametrize(
    ("change", "name"),
    [({"list_length": 5}, "list_length"), ({"limits": {"sequences": 3}}, "limits.sequences")],
)
def test_a_configuration_that_differs_is_named(config, change, name):
    there = facts(config, "math")
    data = {"name": "demo", "experts": msgspec.to_builtins(config.experts), **change}
    here = parse_config(data, directory=Path(config.directory))
    assert disagreement(here, there).startswith(f"{name} is ")


def test_models_that_differ_are_named_and_missing_weights_are_not(config):
    there = facts(config, "math")
    weights = config.path("math") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert disagreement(config, there).startswith("weights is ")
    weights.unlink()
    assert disagreement(config, there) == ""
    file = config.path("math") / "config.json"
    file.write_text(file.read_text() + " ")
    assert disagreement(config, there).startswith("model is ")
    file.unlink()
    with pytest.raises(StartError, match=r"expert math: .*config.json.*every host needs its JSON files"):
        offer(config, "math")


def test_another_version_is_refused(config):
    there = facts(config, "math")
    assert compare({**there, "polylogit": "0.0.1"}, there).reason.startswith("polylogit is ")
    assert compare({}, there).reason.endswith("and unknown at the coordinator")


def with_gate(config: Config, file: Path) -> Config:
    return msgspec.structs.replace(config, gate=GateConfig(str(file)))


def test_a_gate_on_hidden_states_must_be_the_same_and_a_recording_gate_need_not(config, tmp_path):
    tokenizer = config.path("math") / "tokenizer.json"
    hidden = with_gate(config, gates.build(tmp_path / "hidden.pt", experts=NAMES, tokenizer=tokenizer, top_k=200))
    assert terms(hidden) == Terms(200, "gate")
    assert disagreement(hidden, facts(hidden, "math")) == ""
    assert disagreement(hidden, facts(config, "math")).startswith("gate is none at the expert")
    assert disagreement(config, facts(hidden, "math")) == ""
    recording = tmp_path / "recording.pt"
    wrap(*uniform_gate(NAMES, "0" * 64, 32), [6, 8], recording)
    assert read_contract(recording).recording and not read_contract(tmp_path / "hidden.pt").recording
    assert terms(with_gate(config, recording)) == Terms(128, "raw", width=8)
    assert disagreement(with_gate(config, recording), facts(config, "math")) == ""


def test_raw_hidden_states_are_padded_as_the_recording_gate_pads_them():
    import torch

    raw = projector(Terms(128, "raw", width=8), None)
    assert raw is not None
    hidden = torch.arange(12.0).reshape(2, 6)
    found = raw.project(1, hidden)
    assert torch.equal(found, torch.cat([hidden, torch.zeros(2, 2)], dim=1))
    assert projector(Terms(128, "none"), None) is None
