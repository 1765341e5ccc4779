"""The entry of a worker process: settle on cores or devices, then import torch and vLLM, then serve."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from server.config import Config, ExpertConfig
from server.transport import endpoint


def run(config: Config, expert: int, generation: int, directory: Path, cpus: Sequence[int] | None) -> None:
    """Load expert number `expert` on cores `cpus` (None: wherever) and serve it until told to stop.

    Raises whatever the engine raises while loading.
    """
    chosen = config.experts[expert]
    if cpus:
        os.sched_setaffinity(0, cpus)
    os.environ.update(environment(chosen, cpus))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.simplefilter("ignore")  # what torch and vLLM warn of at import is not our user's to mend

    import torch

    if chosen.device == "cpu":
        torch.set_num_threads(len(cpus or (0,)))

    from gate.checkpoint import Gate, load
    from server.expert.vllm_engine import VllmEngine
    from server.expert.worker import Worker
    from server.messages import FromExpert, ToExpert
    from server.transport import Channel

    gate: Gate | None = None
    if config.gate is not None:
        gate = load(config.path(config.gate.file), device="cuda" if chosen.device == "cuda" else "cpu")
        gate = gate if "hidden" in gate.contract.inputs else None
    engine = VllmEngine(
        chosen,
        str(config.path(chosen.model)),
        max_sequences=config.limits.sequences,
        want_hidden=gate is not None,
    )
    channel: Channel[ToExpert, FromExpert] = Channel(
        endpoint(directory, f"expert-{expert}-{generation}"), ToExpert, bind=False
    )
    worker = Worker(
        engine,
        channel,
        expert=expert,
        top_k=config.top_k,
        projector=gate,
        retain=config.missing == "exact",
    )
    try:
        worker.run()
    finally:
        engine.close()
        channel.close()


def environment(expert: ExpertConfig, cpus: Sequence[int] | None) -> dict[str, str]:
    """Environment variables that must be set before torch and vLLM are imported."""
    shared = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if expert.device == "cuda":
        visible = {} if expert.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, expert.gpus))}
        return shared | visible
    cores = list(cpus or ())
    return shared | {
        # Engines run eagerly on the CPU; vLLM's few compiled helpers would only cost seconds at the first request.
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": str(len(cores) or 1),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if cores else "auto",
    }
