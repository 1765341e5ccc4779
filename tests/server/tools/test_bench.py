"""What the benchmark chooses to run, and what it says of a gate; it is run for real in the e2e tests' stead by hand."""

import pytest

from server.config import load_config
from server.errors import ConfigError
from server.policy import Gate, Uniform
from server.tools.bench import Round, _gate_lines, choose_experts
from tests.support.demo import DEMO

CONFIG = load_config(DEMO / "polylogit.yaml")


def test_without_a_gate_some_experts_are_fused_uniformly():
    chosen = choose_experts(CONFIG, "math,text")
    assert (chosen.expert_names, chosen.gate) == (["math", "text"], None)
    assert chosen.policies == {"uniform": Uniform()}


def test_with_the_gate_all_are_fused_by_it():
    chosen = choose_experts(CONFIG, None, gated=True)
    assert (chosen.expert_names, chosen.gate) == (CONFIG.expert_names, CONFIG.gate)
    assert chosen.policies == {"gate": Gate()}
    with pytest.raises(ConfigError, match="--gate"):
        choose_experts(CONFIG, "math,text", gated=True)


def test_the_gates_share_is_the_median_over_rounds():
    rounds = [
        Round(32, 1.0, {}, {}, {"tick": tick, "gate": gate}, 0.0)
        for tick, gate in ((10.0, 0.1), (5.0, 0.2), (10.0, 0.3))
    ]
    assert _gate_lines(rounds) == ["gate at 32 sequences: 0.200 ms, 3.0% of a tick"]
