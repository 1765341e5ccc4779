"""What the benchmark chooses to run, and what it says of a gate; it is run for real in the e2e tests' stead by hand."""

from types import SimpleNamespace

import msgspec
import pytest

from server.cli import main
from server.config import load_config
from server.errors import ConfigError
from server.policy import Gate, Uniform
from server.tools.bench import Round, _gate_lines, _Runner, check_lengths, choose_experts
from tests.support import demo
from tests.support.demo import DEMO

CONFIG = load_config(DEMO / "polylogit.yaml")


def test_without_a_gate_some_experts_are_fused_uniformly():
    chosen = choose_experts(CONFIG, ["math", "text"])
    assert (chosen.expert_names, chosen.gate) == (["math", "text"], None)
    assert chosen.policies == {"uniform": Uniform()}


def test_with_the_gate_all_are_fused_by_it():
    chosen = choose_experts(CONFIG, [], gated=True)
    assert (chosen.expert_names, chosen.gate) == (CONFIG.expert_names, CONFIG.gate)
    assert chosen.policies == {"gate": Gate()}
    with pytest.raises(ConfigError, match="--gate"):
        choose_experts(CONFIG, ["math", "text"], gated=True)


def test_the_gates_share_is_the_median_over_rounds():
    rounds = [
        Round(32, 1.0, {}, {}, {"tick": tick, "gate": gate}, 0.0)
        for tick, gate in ((10.0, 0.1), (5.0, 0.2), (10.0, 0.3))
    ]
    assert _gate_lines(rounds) == ["gate at 32 sequences: 0.200 ms, 3.0% of a tick"]


def test_prompts_and_answers_fit_the_shortest_context():
    experts = [msgspec.structs.replace(expert, max_model_len=96) for expert in CONFIG.experts[:1]] + CONFIG.experts[1:]
    config = msgspec.structs.replace(CONFIG, experts=experts)
    assert check_lengths(config, 32, 64) == demo.VOCABULARY
    with pytest.raises(ConfigError, match=f"--tokens 65: expert {experts[0].name} has room for 96 together"):
        check_lengths(config, 32, 65)


def test_prompts_are_of_tokens_that_a_small_vocabulary_has():
    single = msgspec.structs.replace(CONFIG, policies={"uniform": Uniform()}, default_policy="uniform")
    runner = _Runner(SimpleNamespace(), single, 32, 4, 20)
    prompts = runner._request(Uniform(), 5).prompts
    assert {token for prompt in prompts for token in prompt} == set(range(20))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--sequences", "1,a"], "argument --sequences: 'a' is not a whole number"),
        (["--sequences", "0"], "argument --sequences: must be at least 1"),
        (["--tokens", "3"], "argument --tokens: must be at least 4"),
        (["--rounds", "0"], "argument --rounds: must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_measured(capsys, option, words):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "any.yaml", *option])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"{words}\n")
