"""The processes of a deployment, one for each role: coordinator, api, and one for each rank of each expert. What a role
needs is imported in its own process.
"""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

from server import logs
from server.config import Config
from server.expert.ranks import meeting
from server.launch.children import Child, Children, spawn
from server.placement import Placement, expert_cpus, expert_gpus
from server.wire.api import API_SOCKET
from server.wire.channel import Channel, endpoint
from server.wire.supervisor import CONTROL_SOCKET, FromSupervisor, ToSupervisor


def start_coordinator(config: Config, directory: Path) -> Child:
    """`directory`: the private one, in which all sockets of the deployment are."""
    return spawn("coordinator", partial(run_coordinator, config, directory), capture=_captured(config))


def start_api(config: Config, directory: Path, bound: socket.socket) -> Child:
    """`bound`: where it serves HTTP."""
    run = partial(run_api, config, endpoint(directory, API_SOCKET), bound)
    return spawn("api", run, capture=_captured(config))


def start_expert(
    config: Config, expert: int, generation: int, directory: Path, bound: socket.socket | None = None
) -> Children:
    """The processes of an expert, one for each tensor-parallel rank. `bound`: where the first of them awaits a
    coordinator on another host."""
    size = config.experts[expert].tensor_parallel_size
    cores, gpus = expert_cpus(config)[expert], expert_gpus(config)[expert]
    ranks = Children()
    for rank in range(size):
        own = cores[rank::size] or cores if cores else None
        place = Placement(expert, generation, rank, own, gpus)
        ranks.add(
            spawn(
                process_name(config, place),
                partial(run_expert, config, place, directory, None if rank else bound),
                capture=_captured(config),
                shared_memory=ranks_memory(directory, place) if size > 1 else "",
            )
        )
    return ranks


def control_channel(directory: Path) -> Channel[ToSupervisor, FromSupervisor]:
    """The way to the coordinator, for whoever started it."""
    return Channel(endpoint(directory, CONTROL_SOCKET), ToSupervisor, bind=False)


def process_name(config: Config, place: Placement) -> str:
    """What a worker process is called."""
    chosen = config.experts[place.expert]
    return f"expert {chosen.name}" + (f" rank {place.rank}" if chosen.tensor_parallel_size > 1 else "")


def ranks_memory(directory: Path, place: Placement) -> str:
    """What vLLM leaves behind in /dev/shm when the CPU ranks of an expert are killed, a glob pattern."""
    return f"*{meeting(directory, place).name}-*cpushm_*"


def run_coordinator(config: Config, directory: Path) -> None:
    logs.configure(config.logging, "coordinator")
    from server.coordinator.process import run

    run(config, directory)


def run_api(config: Config, address: str, bound: socket.socket) -> None:
    logs.configure(config.logging, "api")
    from server.api.process import run

    run(config, address, bound)


def run_expert(config: Config, place: Placement, directory: Path, bound: socket.socket | None) -> None:
    logs.configure(config.logging, process_name(config, place))
    from server.expert.process import run

    run(config, place, directory, bound)


def _captured(config: Config) -> bool:
    """Whether everything that a process writes must become JSON."""
    return config.logging.format == "json"
