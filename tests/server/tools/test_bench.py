"""What the benchmark chooses to run, and what it says of it, over a deployment that answers at once; it is run for real
in the e2e tests' stead by hand."""

from __future__ import annotations

import json

import msgspec
import pytest

from server.cli import main
from server.config import Config, load_config
from server.errors import ConfigError
from server.launch.local import Generated
from server.policy import Gate, Single, Uniform
from server.request import SequenceRequest
from server.tools import bench as module
from server.tools.bench import Round, Shown, _gate_lines, bench, check_lengths, choose_experts
from server.tools.options import BenchOptions
from server.wire.expert import Bare
from server.wire.stats import Stats
from tests.support import demo
from tests.support.api.fake_coordinator import stats
from tests.support.demo import DEMO

FILE = DEMO / "polylogit.yaml"
CONFIG = load_config(FILE)
NOTHING = Shown(0.0, 0.0, {})


class FakeDeployment:
    """Each tick takes a millisecond. A token of two sequences or more needs whole rows once in four times."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.asked: list[SequenceRequest] = []
        self._stats = stats()

    def __enter__(self) -> FakeDeployment:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bare(self, experts: list[int], bare: Bare) -> dict[int, list[float]]:
        return {expert: [1e-3] * bare.tokens for expert in experts}

    def generate(self, requests: list[SequenceRequest]) -> dict[int, Generated]:
        self.asked += requests
        tokens = sum(request.max_tokens for request in requests)
        self._stats = grown(self._stats, tokens, whole=tokens // 4 if len(requests) > 1 else 0)
        return {
            request.id: Generated(arrivals=[1e-3 * tick for tick in range(request.max_tokens)]) for request in requests
        }

    def stats(self) -> Stats:
        return self._stats


def grown(before: Stats, tokens: int, *, whole: int) -> Stats:
    """After so many more tokens, some of which needed whole rows of an expert that lists 100 bytes a token."""
    [expert] = before.experts
    received = {"lists": expert.received_bytes["lists"] + 100 * tokens, "rows": expert.received_bytes["rows"] + whole}
    return msgspec.structs.replace(
        before,
        tokens=before.tokens + tokens,
        whole_rows=before.whole_rows | {"token": before.whole_rows["token"] + whole},
        experts=[msgspec.structs.replace(expert, received_bytes=received)],
    )


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> list[FakeDeployment]:
    """Those that were started."""
    started: list[FakeDeployment] = []

    def start(config: Config) -> FakeDeployment:
        started.append(FakeDeployment(config))
        return started[-1]

    monkeypatch.setattr(module, "LocalDeployment", start)
    return started


def test_greedy_without_log_probabilities_unless_told(deployments):
    assert bench(BenchOptions(config=FILE, sequences=(1,), tokens=8, rounds=1)) == 0
    [deployment] = deployments
    assert deployment.config.list_length == CONFIG.list_length
    assert {request.sampling.temperature for request in deployment.asked} == {0.0}
    assert {request.top_logprobs for request in deployment.asked} == {None}


def test_sampling_log_probabilities_and_lists_as_told(deployments):
    options = BenchOptions(
        config=FILE, sequences=(2,), tokens=8, rounds=1, temperature=1.5, top_logprobs=5, list_length=16
    )
    assert bench(options) == 0
    [deployment] = deployments
    assert deployment.config.list_length == 16
    assert {request.sampling.temperature for request in deployment.asked} == {1.5}
    assert {request.top_logprobs for request in deployment.asked} == {5}
    assert {type(request.policy) for request in deployment.asked} == {Uniform, Single}
    assert len({request.sampling.seed for request in deployment.asked}) == len(deployment.asked)


def test_what_experts_showed_stands_in_the_file_and_on_the_screen(deployments, tmp_path, capsys):
    file = tmp_path / "new" / "bench.json"
    assert bench(BenchOptions(config=FILE, sequences=(1, 2), tokens=8, rounds=2, json=file)) == 0
    rounds = json.loads(file.read_text())["rounds"]
    assert [(entry["sequences"], entry["shown"]) for entry in rounds] == 2 * [
        (1, {"lists": 100.0, "rows": 0.0, "whole": {"token": 0.0, "logprobs": 0.0}}),
        (2, {"lists": 100.0, "rows": 0.25, "whole": {"token": 0.25, "logprobs": 0.0}}),
    ]
    printed = capsys.readouterr().out
    assert "what experts showed for a fused token" in printed and "25.0%" in printed


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
        Round(32, 1.0, {}, {}, {"tick": tick, "gate": gate}, NOTHING, 0.0)
        for tick, gate in ((10.0, 0.1), (5.0, 0.2), (10.0, 0.3))
    ]
    assert _gate_lines(rounds) == ["gate at 32 sequences: 0.200 ms, 3.0% of a tick"]


def test_prompts_and_answers_fit_the_shortest_context():
    experts = [msgspec.structs.replace(expert, max_model_len=96) for expert in CONFIG.experts[:1]] + CONFIG.experts[1:]
    config = msgspec.structs.replace(CONFIG, experts=experts)
    assert check_lengths(config, 32, 64) == demo.VOCABULARY
    with pytest.raises(ConfigError, match=f"--tokens 65: expert {experts[0].name} has room for 96 together"):
        check_lengths(config, 32, 65)


def test_prompts_are_of_tokens_that_a_small_vocabulary_has(deployments, monkeypatch):
    monkeypatch.setattr(module, "check_lengths", lambda *_: 20)
    bench(BenchOptions(config=FILE, sequences=(8,), tokens=4, rounds=1))
    prompts = [prompt for request in deployments[0].asked for prompt in request.prompts]
    assert {token for prompt in prompts for token in prompt} == set(range(20))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--sequences", "1,a"], "argument --sequences: 'a' is not a whole number"),
        (["--sequences", "0"], "argument --sequences: must be at least 1"),
        (["--tokens", "3"], "argument --tokens: must be at least 4"),
        (["--rounds", "0"], "argument --rounds: must be at least 1"),
        (["--temperature", "-1"], "argument --temperature: must be from 0 to 2"),
        (["--top-logprobs", "-1"], "argument --top-logprobs: must be at least 0"),
        (["--list-length", "0"], "argument --list-length: must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_measured(capsys, option, words):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "any.yaml", *option])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"{words}\n")
