"""What a worker process settles on before its engine is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.config import ExpertConfig, parse_config
from server.errors import ConfigError
from server.expert.process import projecting_gate
from server.expert.settle import environment
from server.placement import Placement
from tests.support import demo, gates
from tests.support.listening import listening, own_address

GROUP = """
import socket, sys
import torch.distributed
socket.sethostname(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
print("ready", flush=True)
sys.stdin.read()
"""
"""A process group as vLLM makes one also for a single rank, where the host's name means an address."""


def place(rank: int = 0, cpus: list[int] | None = None, gpus: Sequence[int] = ()) -> Placement:
    return Placement(expert=0, generation=0, rank=rank, cpus=cpus, gpus=list(gpus))


def test_gpus_are_counted_in_the_order_of_their_bus() -> None:
    """As nvidia-smi and containers count them; CUDA's default would put the fastest first."""
    expert = ExpertConfig(name="math", model="m", device="cuda", gpus=[2, 0], tensor_parallel_size=2)
    chosen = environment(expert, place(gpus=[2, 0]))
    assert (chosen["CUDA_DEVICE_ORDER"], chosen["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "2,0")


def test_an_expert_on_the_cpu_is_told_nothing_of_gpus() -> None:
    expert = ExpertConfig(name="math", model="m", cpus=[3, 4])
    chosen = environment(expert, place(cpus=[3, 4]))
    assert not [name for name in chosen if name.startswith("CUDA")]
    assert (chosen["OMP_NUM_THREADS"], chosen["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "3,4")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_expert_listens_on_loopback_wherever_the_hosts_name_leads(device: str, tmp_path: Path) -> None:
    if (address := own_address()) is None:
        pytest.skip("this machine has no address but loopback")
    expert = ExpertConfig(name="math", model="m", device=device)
    chosen = environment(expert, place(gpus=[0]))
    with subprocess.Popen(
        ["unshare", "--map-root-user", "--uts", sys.executable, "-c", GROUP, address, str(tmp_path / "meeting")],
        env={**os.environ, **chosen},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            words = process.stderr.read().decode()
            pytest.skip("host names cannot be set here") if "unshare" in words else pytest.fail(words)
        found = listening([process.pid])
        assert found and all(each.is_loopback for each in found)


def test_of_several_ranks_the_first_projects(tmp_path: Path) -> None:
    """On the others the gate would be on another GPU than the hidden states, and nobody would hear them."""
    tokenizer = demo.model("math") / "tokenizer.json"
    file = gates.build(tmp_path / "gate.pt", experts=demo.EXPERTS, tokenizer=tokenizer, top_k=8)
    data = demo.configuration(gate={"file": str(file)}, expert={"tensor_parallel_size": 2})
    config = parse_config(data, directory=demo.DEMO)
    gate = projecting_gate(config, place(0))
    assert gate is not None and gate.contract.inputs == ["topk", "hidden"]
    assert projecting_gate(config, place(1)) is None


@pytest.mark.parametrize(
    "name",
    ["enable_batch_sharded_sampling", "pipeline_parallel_size", "data_parallel_size", "logprobs_mode", "spec_model"],
)
def test_an_engine_is_not_told_what_the_rendezvous_cannot_survive(name: str) -> None:
    data = demo.configuration(only={"math": {"engine_args": {name: 1}}})
    with pytest.raises(ConfigError, match=f"engine_args: '{name}' is not free"):
        parse_config(data, directory=demo.DEMO)
