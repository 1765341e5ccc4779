"""Where worker processes stand: which expert and rank, on which cores and GPUs."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from server.config import Config, ExpertConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker process. `expert` is its index, `generation` counts its restarts. `rank` of `tensor_parallel_size`;
    `port` on 127.0.0.1 is where the ranks meet (0 with one rank). `cpus`: the cores of this process, None for wherever;
    `gpus`: indices of the expert's GPUs."""

    expert: int
    generation: int
    rank: int
    port: int
    cpus: list[int] | None
    gpus: list[int]

    def socket(self, rank: int = 0) -> str:
        """Name of the socket on which rank 0 hears the coordinator, or another rank hears rank 0."""
        return expert_socket(self.expert, self.generation) + (f"-{rank}" if rank else "")


def expert_socket(expert: int, generation: int) -> str:
    """Name of the socket between the coordinator and worker process `generation` of an expert."""
    return f"expert-{expert}-{generation}"


def expert_cpus(config: Config) -> list[list[int] | None]:
    """The cores of each expert: as configured; the other CPU experts take this process's remaining cores in turn."""
    named = {core for expert in config.experts for core in expert.cpus or ()}
    everywhere = os.sched_getaffinity(0)
    available = sorted(everywhere - named) or sorted(everywhere)
    on_cpu = [index for index, expert in enumerate(config.experts) if expert.device == "cpu" and not expert.cpus]
    share: dict[int, list[int]] = {}
    for turn, index in enumerate(on_cpu):
        own = available[turn :: len(on_cpu)] if len(on_cpu) <= len(available) else []
        share[index] = own or [available[turn % len(available)]]
    return [expert.cpus or share.get(index) for index, expert in enumerate(config.experts)]


def expert_gpus(config: Config) -> list[list[int]]:
    """The GPUs of each expert: as configured, else as many as it has ranks, the next that no other expert names."""
    named = {gpu for expert in config.experts for gpu in expert.gpus or ()}
    free = (gpu for gpu in itertools.count() if gpu not in named)
    chosen = []
    for expert in config.experts:
        default = [next(free) for _ in range(expert.tensor_parallel_size)] if _needs_gpus(expert) else []
        chosen.append(default if expert.gpus is None else expert.gpus)
    return chosen


def _needs_gpus(expert: ExpertConfig) -> bool:
    return expert.device == "cuda" and expert.gpus is None
