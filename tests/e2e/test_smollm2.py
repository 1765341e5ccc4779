"""A real model with a real vocabulary, served by three engines, against transformers: every policy, over 49,152 tokens.

Needs the models of `deploy/smollm2`, in the folder that the environment variable POLYLOGIT_SMOLLM2 names, and twenty
minutes. `python -m tests.bench.tokens` does the same and writes the counts down.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import policy as policies
from server.config import parse_config
from server.launch.local import LocalDeployment
from tests.support.oracle import smollm2
from tests.support.oracle.huggingface import Reference

needs_models = pytest.mark.skipif(
    smollm2.folder() is None, reason=f"{smollm2.VARIABLE} names no folder with the models of deploy/smollm2"
)
MAX_NEAR_DIFFERENT = 0.01


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
    found = smollm2.compare(name, served, gate, oracle, asked)
    print(f"\n{found}")
    assert found.positions == len(smollm2.PROMPTS) * smollm2.TOKENS
    assert not found.wrong
    assert found.near_different <= MAX_NEAR_DIFFERENT * found.positions


def test_every_policy_is_compared() -> None:
    assert {type(policy) for policy, _ in smollm2.CASES.values()} == set(typing.get_args(policies.Policy))
