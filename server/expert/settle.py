"""What a worker process must settle before it imports torch and vLLM: its cores or devices, environment and logging."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from server.allocation import keep_freed_memory
from server.config import ExpertConfig
from server.placement import Placement


def settle(expert: ExpertConfig, place: Placement, directory: Path) -> None:
    """Put this process on its cores or devices, with logging and warnings as ours are."""
    if place.cpus:
        os.sched_setaffinity(0, place.cpus)
        # An engine that wakes must not push the coordinator off this core before it has woken the other engines too.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    keep_freed_memory()
    os.environ.update(environment(expert, place))
    os.environ["TMPDIR"] = str(directory)  # vLLM's files go when the directory goes, even if this process is killed
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its lines are to look like ours
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What torch and vLLM warn of at import is not our user's to mend.
    warnings.simplefilter("ignore")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def environment(expert: ExpertConfig, place: Placement) -> dict[str, str]:
    """Environment variables that must be set before torch and vLLM are imported."""
    chosen = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # The ranks of an expert share a host. Left alone, each process group, also one of a single rank, listens on the
        # address that the host's name resolves to.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    if expert.tensor_parallel_size > 1:
        chosen |= _rank_environment(place, expert.tensor_parallel_size)
    if expert.device == "cuda":
        # CUDA's own order puts the fastest first; the configuration counts as nvidia-smi does, whatever is built in.
        return chosen | {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpus)),
        }
    cores = place.cpus or []
    return chosen | {
        # Engines run eagerly on the CPU; vLLM's few compiled helpers would only cost seconds at the first request.
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(len(cores) or 1),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if cores else "auto",
    }


def _rank_environment(place: Placement, ranks: int) -> dict[str, str]:
    """What vLLM takes from a launcher such as torchrun."""
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
