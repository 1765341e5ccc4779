"""The entry of a worker process: settle on cores or devices, then import torch and vLLM, then serve."""

from __future__ import annotations

import gc
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from server import logs
from server.config import Config, ExpertConfig
from server.expert.ranks import CoordinatorLink, coordinator_link, meeting
from server.expert.settle import settle
from server.placement import Placement
from server.remote.agreement import Terms, end_tokens, facts, list_length
from server.remote.handshake import load_key
from server.remote.listener import Listener

if TYPE_CHECKING:
    from gate.checkpoint import Checkpoint
    from server.expert.engine import Engine
    from server.expert.worker import Projector


def run(config: Config, place: Placement, directory: Path, bound: socket.socket | None = None) -> None:
    """Load the expert at `place` and serve it until told to stop; on another host than the coordinator's, for ever, to
    one coordinator after another that comes to `bound` (of rank 0).

    Raises whatever the engine raises while loading.
    """
    expert = config.experts[place.expert]
    settle(expert, place, directory)
    _import_libraries(expert, place)
    # Before the engine: while it loads, the ranks find each other, so that the first tick reaches them all.
    listener = None if bound is None else _listener(config, expert, bound)
    link = coordinator_link(place, expert.tensor_parallel_size, directory, listener)
    gate = projecting_gate(config, place)
    engine = _load_engine(config, place, directory, projects=gate is not None)
    serve = partial(_serve, config, place, engine, link, gate)
    try:
        if listener is not None:
            serve_visitors(listener, serve)
        elif expert.address is None:
            serve(_local_terms(config, gate))
        else:
            while True:  # a rank that hears what rank 0 hears, and is not heard
                serve(_local_terms(config, gate))
    finally:
        engine.close()
        link.close()


def _import_libraries(expert: ExpertConfig, place: Placement) -> None:
    """torch, with one thread on each core, then vLLM: before anything is on a GPU."""
    gc.disable()  # what imports make stays: to look for garbage among it would take a third of the start
    import torch

    if expert.device == "cpu":
        torch.set_num_threads(len(place.cpus or (0,)))

    import server.expert.vllm_engine  # noqa: F401

    gc.freeze()
    gc.enable()


def _listener(config: Config, expert: ExpertConfig, bound: socket.socket) -> Listener:
    return Listener(bound, load_key(config), facts(config, expert.name), hang_seconds=config.limits.tick_seconds)


def projecting_gate(config: Config, place: Placement) -> Checkpoint | None:
    """The gate, if it reads hidden states: its projection runs at `place`. Only rank 0 is heard, and only its device is
    the one that the gate is loaded on."""
    from gate.checkpoint import load

    if config.gate is None or place.rank:
        return None
    device = config.experts[place.expert].device
    gate = load(config.path(config.gate.file), device=device, sha256=config.gate.sha256)
    return gate if "hidden" in gate.contract.inputs else None


def _load_engine(config: Config, place: Placement, directory: Path, *, projects: bool) -> Engine:
    """`projects`: a gate here reads its hidden states."""
    from server.expert.vllm_engine import VllmEngine

    expert = config.experts[place.expert]
    started = time.perf_counter()
    engine = VllmEngine(
        expert,
        str(config.path(expert.model)),
        meeting=meeting(directory, place),
        max_sequences=config.limits.sequences,
        # A coordinator on another host may ask for them; it hears rank 0 only.
        want_hidden=projects or (expert.address is not None and not place.rank),
        end_tokens=end_tokens(config),
    )
    found = logs.fields(
        seconds=round(time.perf_counter() - started, 1),
        kv_tokens=engine.info.kv_tokens,
        max_model_len=engine.info.max_model_len,
        vllm=engine.info.version,
    )
    logging.getLogger("polylogit.expert").info("engine loaded", extra=found)
    return engine


def _local_terms(config: Config, gate: Checkpoint | None) -> Terms:
    """What a coordinator on this host wishes: it has the same configuration."""
    return Terms(list_length(config), "none" if gate is None else "gate")


def serve_visitors(listener: Listener, serve: Callable[[Terms], None]) -> None:
    """`serve` one coordinator after another, as each wishes, until `listener` is closed."""
    listener.open()
    while (terms := listener.admit()) is not None:
        serve(terms)


def _serve(
    config: Config, place: Placement, engine: Engine, link: CoordinatorLink, gate: Checkpoint | None, terms: Terms
) -> None:
    """Drive `engine` for one coordinator, until that one has gone."""
    from server.expert.worker import Worker

    Worker(
        engine,
        link,
        expert=place.expert,
        top_k=terms.list_length,
        projector=projector(terms, gate),
        shares_memory=config.experts[place.expert].address is None,
    ).run()


def projector(terms: Terms, gate: Checkpoint | None) -> Projector | None:
    """What a coordinator's terms make of hidden states."""
    from gate.training.recording_gate import RecordingGate, UniformGate

    if terms.projection == "raw":
        return RecordingGate(UniformGate(), [terms.width])
    return gate if terms.projection == "gate" else None
