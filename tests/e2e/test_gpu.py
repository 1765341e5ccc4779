"""The same paths with engines on a GPU: two experts on the first device, against transformers on the CPU.

What only a GPU has: Model Runner V2, CUDA graphs (which exist for some batch sizes, and others are padded to the next),
logits and hidden states that are not in main memory.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.api.tools.grammar import json_grammar
from server.config import parse_config
from server.launch.local import Generated, LocalDeployment
from server.policy import Gate, Perplexity, Policy, Uniform
from server.request import FinishReason, SequenceRequest
from tests.support import demo, gates
from tests.support.lost_expert import Answer, back
from tests.support.oracle import rules
from tests.support.oracle.compare import compare, first_difference
from tests.support.oracle.huggingface import Decoded, Reference
from tests.support.sequences import greedy, sampled
from tests.support.server_process import Served, serve, until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # engines compile and capture before they answer

EXPERTS = ["math", "text"]
GPU = {
    "device": "cuda",
    "gpus": [0],
    "kv_cache_memory": "256MiB",
    "engine_args": {"gpu_memory_utilization": 0.4},  # what vLLM wants free, though it takes no more than it is told
}
PROMPTS = 32
TOKENS = 32
TIE = 1e-2  # another device's float32 products, added in another order
TOLERANCE = 0.1  # of a coefficient, through a gate that makes the most of small differences
SYSTEM = "You are a careful assistant. Answer in as few words as you can. " * 4
HALF = rules.log_linear([0.5, 0.5])
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "minimum": 1, "maximum": 60}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}


def gate(directory: Path, top_k: int) -> dict[str, str]:
    tokenizer = demo.model("math") / "tokenizer.json"
    return {"file": str(gates.build(directory / "gate.pt", experts=EXPERTS, tokenizer=tokenizer, top_k=top_k))}


@pytest.fixture(scope="module")
def whole_gate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return gate(tmp_path_factory.mktemp("gate"), demo.VOCABULARY)


@pytest.fixture(scope="module")
def deployment(whole_gate: dict[str, str]) -> Iterator[LocalDeployment]:
    """Nothing is truncated, and the gate reads hidden states."""
    data = demo.configuration(experts=EXPERTS, list_length=demo.VOCABULARY, gate=whole_gate, expert=GPU)
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def crowded() -> Iterator[LocalDeployment]:
    """Short lists; prompts are read 64 tokens a tick, so that experts with prompts of different
    lengths cannot keep step."""
    data = demo.configuration(
        experts=EXPERTS,
        list_length=16,
        expert={**GPU, "max_num_batched_tokens": 64},
        limits={"sequences": 16, "queue": 64},
    )
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def pair() -> Reference:
    return Reference([demo.model(name) for name in EXPERTS])


def prompts(pair: Reference, count: int) -> list[list[list[int]]]:
    return [[pair.encode(messages)] * 2 for messages in demo.conversations(count)]


def uneven(pair: Reference, count: int) -> list[list[list[int]]]:
    """The second expert has much more to read."""
    system = {"role": "system", "content": SYSTEM}
    return [[pair.encode(each), pair.encode([system, *each])] for each in demo.conversations(count)]


def assert_equal(requests: list[SequenceRequest], results: dict[int, Generated], decoded: Decoded) -> None:
    result = compare([results[request.id].tokens for request in requests], decoded, tie=TIE)
    assert not result.wrong
    assert result.equal > 0.9 * decoded.tokens.numel()


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_greedy_tokens_equal_transformers(space: str, deployment: LocalDeployment, pair: Reference) -> None:
    rows = prompts(pair, PROMPTS)
    policy: Policy = Uniform(space=space)
    requests = [greedy(row, policy, TOKENS) for row in rows]
    rule = HALF if space == "logprob" else rules.linear([0.5, 0.5])
    assert_equal(requests, deployment.generate(requests), pair.decode(rows, rule, TOKENS))


@pytest.mark.parametrize("count", [1, 3, 5, 6, 7, 9])
def test_batches_between_the_sizes_of_cuda_graphs(count: int, deployment: LocalDeployment, pair: Reference) -> None:
    rows = prompts(pair, count)
    requests = [greedy(row, Uniform(), TOKENS) for row in rows]
    assert_equal(requests, deployment.generate(requests), pair.decode(rows, HALF, TOKENS))


def test_coefficients_of_a_gate_on_hidden_states(
    deployment: LocalDeployment, pair: Reference, whole_gate: dict[str, str]
) -> None:
    """Five sequences: the rows of hidden states are not those of a padded batch."""
    rows = prompts(pair, 5)
    requests = [greedy(row, Gate(), TOKENS, expert_weights=True) for row in rows]
    results = deployment.generate(requests)
    decoded = pair.decode(rows, rules.GateRule(Path(whole_gate["file"]), gates.STATE), TOKENS)
    off, seen = [], 0
    for row, request in enumerate(requests):
        at = first_difference(results[request.id].tokens, decoded.tokens[row].tolist())
        same = TOKENS if at is None else at + 1
        found = torch.tensor([each.coefficients for each in results[request.id].details[:same]])
        off.append((found - decoded.coefficients[row, :same]).abs().max())
        seen += same
    assert max(off) < TOLERANCE
    assert seen > 0.8 * len(rows) * TOKENS
    assert decoded.coefficients.std(dim=(0, 1)).max() > TOLERANCE / 2  # a constant would show nothing
    assert deployment.stats().gate_failures == 0


@pytest.mark.parametrize("length", [1, 2, 40])
def test_perplexity_of_a_prompt(length: int, deployment: LocalDeployment, pair: Reference) -> None:
    """Of one token there is nothing to score, and nothing may be waited for."""
    prompt = (pair.encode(demo.conversations(1)[0]) * 3)[:length]
    request = greedy([prompt, prompt], Perplexity(), 4, expert_weights=True)
    found = deployment.generate([request])[request.id].details[0].coefficients
    surprise = [pair.cross_entropy(prompt, expert) if length > 1 else 0.0 for expert in range(2)]
    weights = [math.exp(-each) / sum(math.exp(-other) for other in surprise) for each in surprise]
    assert found == pytest.approx(weights, abs=0.01)


def test_parked_sequences_and_short_lists_give_the_same_tokens(crowded: LocalDeployment, pair: Reference) -> None:
    rows = uneven(pair, 12)
    requests = [greedy(row, Uniform(), TOKENS) for row in rows]
    results, stats = crowded.generate(requests), crowded.stats()
    assert_equal(requests, results, pair.decode(rows, HALF, TOKENS))
    assert stats.parked and stats.readded and stats.phase_seconds["look_up"] > 0


def test_a_grammar_holds_through_parking(crowded: LocalDeployment, pair: Reference) -> None:
    grammar = json_grammar(SCHEMA)
    requests = [
        sampled(row, Uniform(), 64, seed=number, stop_token_ids=[demo.EOS], grammar=grammar)
        for number, row in enumerate(uneven(pair, 7))
    ]
    before = crowded.stats().readded
    results = crowded.generate(requests)
    assert crowded.stats().readded > before
    for request in requests:
        ended = results[request.id].ended
        assert ended is not None and ended.reason is FinishReason.STOP, ended
        value = json.loads(bytes(token for token in results[request.id].tokens if token < 256))
        assert value["colour"] in ("red", "green") and 1 <= value["size"] <= 60


def worker(server: Served) -> int:
    """The process of the last expert; engines may have helpers of their own."""
    parent = f"PPid:\t{server.process.pid}\n"
    return [pid for pid in server.experts() if parent in Path(f"/proc/{pid}/status").read_text()][-1]


def test_degrade_continues_without_a_lost_expert(tmp_path: Path) -> None:
    """And with it when it is back. The gate must not take the silence of the lost one for hidden states."""
    policies: dict[str, Any] = {"uniform": {}, "gate": {"rule": "gate"}}
    data = demo.configuration(
        experts=EXPERTS,
        list_length=16,
        on_expert_loss="degrade",
        gate=gate(tmp_path, 16),
        policies=policies,
        default_policy="uniform",
        expert=GPU,
    )
    with serve(data) as server:
        answer = Answer(server).read(20)
        os.kill(worker(server), signal.SIGKILL)
        answer.read()
        shares = [weights["text"] for weights in answer.weights]
        lost_at = shares.index(0.0)
        assert answer.reason == "length" and lost_at >= 20
        assert set(shares[:lost_at]) == {0.5} and set(shares[lost_at:]) == {0.0}
        without = server.chat(model="demo:gate", max_tokens=8, expert_weights=True)
        assert without["choices"][0]["finish_reason"] in ("stop", "length")
        until(lambda: back(server, 1), limit=300, what="the expert is up again")
        assert server.metrics()["polylogit_gate_failures_total"] == 0
        assert {weights["text"] for weights in Answer(server).read().weights} == {0.5}
