"""What a worker process settles on before torch and vLLM are imported."""

from __future__ import annotations

from server.config import ExpertConfig
from server.expert.process import environment
from server.placement import Placement


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
