"""What a worker process settles on before torch and vLLM are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import ExpertConfig
from server.expert.process import environment
from server.placement import Placement
from tests.server.expert.listening import listening, own_address

GROUP = """
import socket, sys
import torch.distributed
socket.sethostname(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
print("ready", flush=True)
sys.stdin.read()
"""
"""A process group as vLLM makes one also for a single rank, where the host's name means an address."""


def test_gpus_are_counted_in_the_order_of_their_bus() -> None:
    """As nvidia-smi and containers count them; CUDA's default would put the fastest first."""
    expert = ExpertConfig(name="math", model="m", device="cuda", gpus=[2, 0], tensor_parallel_size=2)
    chosen = environment(expert, Placement(expert=0, generation=0, rank=0, port=1, cpus=None, gpus=[2, 0]))
    assert (chosen["CUDA_DEVICE_ORDER"], chosen["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "2,0")


def test_an_expert_on_the_cpu_is_told_nothing_of_gpus() -> None:
    expert = ExpertConfig(name="math", model="m", cpus=[3, 4])
    chosen = environment(expert, Placement(expert=0, generation=0, rank=0, port=0, cpus=[3, 4], gpus=[]))
    assert not [name for name in chosen if name.startswith("CUDA")]
    assert (chosen["OMP_NUM_THREADS"], chosen["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "3,4")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_expert_listens_on_loopback_wherever_the_hosts_name_leads(device: str, tmp_path: Path) -> None:
    if (address := own_address()) is None:
        pytest.skip("this machine has no address but loopback")
    expert = ExpertConfig(name="math", model="m", device=device)
    chosen = environment(expert, Placement(expert=0, generation=0, rank=0, port=0, cpus=None, gpus=[0]))
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
