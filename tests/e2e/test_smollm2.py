"""A real model with a real vocabulary, served by three engines, against transformers: every policy, over 49,152 tokens.

Needs the models of `deploy/smollm2`, in the folder that the environment variable POLYLOGIT_SMOLLM2 names, and half an
hour. `python -m tests.bench.tokens` does the same and writes the counts down.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server import policy as policies
from server.config import parse_config
from server.launch.local import LocalDeployment
from tests.support.oracle import smollm2
from tests.support.oracle.huggingface import Reference
from tests.support.sequences import sampled

needs_models = pytest.mark.skipif(
    smollm2.folder() is None, reason=f"{smollm2.VARIABLE} names no folder with the models of deploy/smollm2"
)
MAX_NEAR_DIFFERENT = 0.01
SAMPLED_PROMPTS = 10
SAMPLED_TOKENS = 16
TOLERANCE = 1e-3  # the default of the configuration


@pytest.fixture(scope="module")
def place() -> Path:
    found = smollm2.folder()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def gate(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2.build_gate(place, tmp_path_factory.mktemp("gate") / "gate.pt")


@pytest.fixture(scope="module")
def served(place: Path, gate: Path) -> Iterator[LocalDeployment]:
    with LocalDeployment(parse_config(smollm2.configuration(place, gate), directory=place)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def oracle(place: Path) -> Reference:
    return Reference(smollm2.models(place))


@pytest.fixture(scope="module")
def asked(oracle: Reference) -> list[list[list[int]]]:
    return smollm2.prompts(oracle)


@needs_models
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", smollm2.CASES)
def test_greedy_tokens_are_those_of_full_fusion(
    name: str, served: LocalDeployment, gate: Path, oracle: Reference, asked: list[list[list[int]]]
) -> None:
    found = smollm2.judge(name, smollm2.serve(name, served, asked), gate, oracle, asked)
    print(f"\n{found}")
    assert found.positions == len(smollm2.PROMPTS) * smollm2.TOKENS
    assert not found.wrong
    assert found.near_different <= MAX_NEAR_DIFFERENT * found.positions


@needs_models
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["uniform", "uniform, prob", "product", "select, entropy"])
def test_reported_log_probabilities_are_those_of_full_fusion(
    name: str, served: LocalDeployment, gate: Path, oracle: Reference, asked: list[list[list[int]]]
) -> None:
    """Of sampled tokens: within the tolerance, and what two implementations may differ by."""
    policy, make_rule = smollm2.CASES[name]
    assert make_rule is not None
    prompts = asked[:SAMPLED_PROMPTS]
    requests = [sampled(row, policy, SAMPLED_TOKENS, seed=number, top_logprobs=0) for number, row in enumerate(prompts)]
    results = served.generate(requests, timeout=600.0)
    off = []
    for row, request in zip(prompts, requests, strict=True):
        result = results[request.id]
        tokens = torch.tensor(result.tokens)[:, None]
        with torch.inference_mode():
            decision = make_rule(gate)(oracle.along(row, result.tokens))
        found = torch.tensor([each.logprob for each in result.details], dtype=torch.float64)
        error = (found - decision.logprobs.gather(1, tokens)[:, 0]).abs()
        off.append(error[decision.slack >= smollm2.NOISE])
    largest = float(torch.cat(off).max())
    print(f"\n{name}: log-probabilities of {SAMPLED_PROMPTS * SAMPLED_TOKENS} sampled tokens are off by {largest:.2g}")
    assert largest < TOLERANCE + smollm2.NOISE


def test_every_policy_is_compared() -> None:
    assert {type(policy) for policy, _ in smollm2.CASES.values()} == set(typing.get_args(policies.Policy))
