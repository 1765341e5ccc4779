"""The entry of a worker process: settle on cores or devices, then import torch and vLLM, then serve."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server import logs
from server.config import Config, ExpertConfig
from server.placement import Placement
from server.remote.agreement import Terms, end_tokens, facts
from server.remote.handshake import load_key
from server.remote.listener import Listener
from server.wire.expert import Ready

if TYPE_CHECKING:
    from gate.checkpoint import Checkpoint
    from server.expert.worker import Projector


def run(config: Config, place: Placement, directory: Path, bound: socket.socket | None = None) -> None:
    """Load the expert at `place` and serve it until told to stop; on another host than the coordinator's, for ever, to
    one coordinator after another that comes to `bound` (of rank 0).

    Raises whatever the engine raises while loading.
    """
    chosen = config.experts[place.expert]
    _settle(chosen, place, directory)
    gc.disable()  # what imports make stays: to look for garbage among it would take a third of the start

    import torch

    if chosen.device == "cpu":
        torch.set_num_threads(len(place.cpus or (0,)))

    from server.expert.ranks import coordinator_link, meeting
    from server.expert.vllm_engine import VllmEngine
    from server.expert.worker import Worker

    gc.freeze()
    gc.enable()
    # Before the engine: while it loads, the ranks find each other, so that the first tick reaches them all.
    listener = None if bound is None else _listener(config, chosen, bound)
    link = coordinator_link(place, chosen.tensor_parallel_size, directory, listener)
    gate = projecting_gate(config, place)
    terms = Terms(exact=config.missing == "exact", projection="none" if gate is None else "gate")
    started = time.perf_counter()
    engine = VllmEngine(
        chosen,
        str(config.path(chosen.model)),
        meeting=meeting(directory, place),
        max_sequences=config.limits.sequences,
        # A coordinator on another host may ask for them; it hears rank 0 only.
        want_hidden=gate is not None or (chosen.address is not None and not place.rank),
        end_tokens=end_tokens(config),
    )
    loaded = logs.fields(seconds=round(time.perf_counter() - started, 1), **_facts(engine.info))
    logging.getLogger("polylogit.expert").info("engine loaded", extra=loaded)

    def serve(terms: Terms) -> None:
        projector = _projector(terms, gate)
        Worker(
            engine,
            link,
            expert=place.expert,
            top_k=config.top_k,
            projector=projector,
            retain=terms.exact,
        ).run()

    try:
        if chosen.address is None:
            serve(terms)
        elif listener is None:
            while True:  # a rank that hears what rank 0 hears, and is not heard
                serve(terms)
        else:
            serve_visitors(listener, serve)
    finally:
        engine.close()
        link.close()


def _settle(expert: ExpertConfig, place: Placement, directory: Path) -> None:
    """On its cores or devices, with logging and warnings as ours are: before torch and vLLM are imported."""
    if place.cpus:
        os.sched_setaffinity(0, place.cpus)
        # An engine that wakes must not push the coordinator off this core before it has woken the other engines too.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.environ.update(environment(expert, place))
    os.environ["TMPDIR"] = str(directory)  # vLLM's files go when the directory goes, even if this process is killed
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # its lines are to look like ours
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR"))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What torch and vLLM warn of at import is not our user's to mend.
    warnings.simplefilter("ignore")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


def _facts(info: Ready) -> dict[str, int | str]:
    return {"kv_tokens": info.kv_tokens, "max_model_len": info.max_model_len, "vllm": info.version}


def serve_visitors(listener: Listener, serve: Callable[[Terms], None]) -> None:
    """`serve` one coordinator after another, as each wishes, until `listener` is closed."""
    listener.open()
    while (terms := listener.admit()) is not None:
        serve(terms)


def _projector(terms: Terms, gate: Checkpoint | None) -> Projector | None:
    from gate.recording import RecordingGate, UniformGate

    if terms.projection == "raw":
        return RecordingGate(UniformGate(), [terms.width])
    return gate if terms.projection == "gate" else None


def _listener(config: Config, expert: ExpertConfig, bound: socket.socket) -> Listener:
    return Listener(bound, load_key(config), facts(config, expert.name), hang_seconds=config.limits.tick_seconds)


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


def projecting_gate(config: Config, place: Placement) -> Checkpoint | None:
    """The gate, if it reads hidden states: its projection runs at `place`. Only rank 0 is heard, and only its device is
    the one that the gate is loaded on."""
    from gate.checkpoint import load

    if config.gate is None or place.rank:
        return None
    device = config.experts[place.expert].device
    gate = load(config.path(config.gate.file), device=device, sha256=config.gate.sha256)
    return gate if "hidden" in gate.contract.inputs else None
