"""Deployments of real engines, each started once and shared. Everything in this folder is marked `e2e`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import parse_config
from server.launch.local import LocalDeployment
from tests.support import compose, demo, gates, lost_expert, scheduling
from tests.support.oracle.huggingface import Reference
from tests.support.server_process import Served, serve


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    scheduling.check(items)


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference([demo.model(name) for name in demo.EXPERTS])


@pytest.fixture(scope="session")
def whole_gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gate over lists that hold the whole vocabulary."""
    return gates.build(
        tmp_path_factory.mktemp("gate") / "whole.pt",
        experts=demo.EXPERTS,
        tokenizer=demo.model("math") / "tokenizer.json",
        top_k=demo.VOCABULARY,
    )


@pytest.fixture(scope="session")
def whole(whole_gate: Path) -> Iterator[LocalDeployment]:
    """Three experts, lists the size of the vocabulary: nothing is truncated, so fusion must be exact."""
    limits = {"sequences": 64, "queue": 4096}
    data = demo.configuration(list_length=demo.VOCABULARY, gate={"file": str(whole_gate)}, limits=limits)
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDeployment]:
    """Three experts that can hardly keep step: prompts are read 64 tokens a tick, the engine of `text` has KV cache for
    four or five sequences, nothing is held in reserve; lists of 32, and a gate with state."""
    gate = gates.build(
        tmp_path_factory.mktemp("gate") / "cramped.pt",
        experts=demo.EXPERTS,
        tokenizer=demo.model("math") / "tokenizer.json",
        top_k=32,
    )
    data = demo.configuration(
        list_length=32,
        gate={"file": str(gate)},
        limits={"sequences": 24, "queue": 4096, "kv_watermark": 0.0},
        expert={"max_model_len": 256, "max_num_batched_tokens": 64},
        only={"text": {"engine_args": {"num_gpu_blocks_override": 20}}},
    )
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def demo_server() -> Iterator[Served]:
    """The demo as deploy/compose.yaml starts it, for tests that only use it."""
    service = compose.load("compose.yaml")["services"]["demo"]
    with serve([*compose.command(service), "--host", "127.0.0.1"], service["environment"]) as server:
        yield server


@pytest.fixture(scope="session")
def waiting_server() -> Iterator[Served]:
    """Two experts; when one is lost, answers wait until it is back."""
    with serve(lost_expert.configuration("wait")) as server:
        yield server


@pytest.fixture(scope="session")
def undisturbed(waiting_server: Served) -> lost_expert.Undisturbed:
    answer = lost_expert.Answer(waiting_server).read()
    return lost_expert.Undisturbed(answer, lost_expert.Crowd(waiting_server).texts())
