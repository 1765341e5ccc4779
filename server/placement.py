"""Where worker processes stand: which expert and rank, on which cores and GPUs."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from server.config import Config, ExpertConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker process."""

    expert: int
    """Index of its expert."""
    generation: int
    """How often the expert's processes have been started again."""
    rank: int
    """Of the `tensor_parallel_size` processes of its expert, from 0."""
    cpus: list[int] | None
    """The cores of this process; None for wherever."""
    gpus: list[int]
    """The GPUs of the expert, counted in the order of their bus."""

    def socket(self, rank: int = 0) -> str:
        """Name of the socket on which rank 0 hears the coordinator, or another rank hears rank 0."""
        return expert_socket(self.expert, self.generation) + (f"-{rank}" if rank else "")


def expert_socket(expert: int, generation: int) -> str:
    """Name of the socket between the coordinator and worker process `generation` of an expert."""
    return f"expert-{expert}-{generation}"


def expert_cpus(config: Config) -> list[list[int] | None]:
    """The cores of each expert: as configured; the other CPU experts of its host take this process's remaining cores in
    turn."""
    cores: list[list[int] | None] = [None] * len(config.experts)
    for neighbours in _by_host(config):
        named = {core for index in neighbours for core in config.experts[index].cpus or ()}
        everywhere = os.sched_getaffinity(0)
        available = sorted(everywhere - named) or sorted(everywhere)
        on_cpu = [index for index in neighbours if _needs_cores(config.experts[index])]
        for turn, index in enumerate(on_cpu):
            own = available[turn :: len(on_cpu)] if len(on_cpu) <= len(available) else []
            cores[index] = own or [available[turn % len(available)]]
    return [expert.cpus or share for expert, share in zip(config.experts, cores, strict=True)]


def expert_gpus(config: Config) -> list[list[int]]:
    """The GPUs of each expert: as configured, else as many as it has ranks, the next that no other expert of its host
    names."""
    chosen: list[list[int]] = [[] for _ in config.experts]
    for neighbours in _by_host(config):
        experts = [config.experts[index] for index in neighbours]
        named = {gpu for expert in experts for gpu in expert.gpus or ()}
        free = (gpu for gpu in itertools.count() if gpu not in named)
        for index, expert in zip(neighbours, experts, strict=True):
            default = list(itertools.islice(free, expert.tensor_parallel_size)) if _needs_gpus(expert) else []
            chosen[index] = default if expert.gpus is None else expert.gpus
    return chosen


def _by_host(config: Config) -> list[list[int]]:
    """The experts' indices, host by host."""
    hosts = [expert.host for expert in config.experts]
    return [[index for index, host in enumerate(hosts) if host == each] for each in dict.fromkeys(hosts)]


def _needs_cores(expert: ExpertConfig) -> bool:
    return expert.device == "cpu" and not expert.cpus


def _needs_gpus(expert: ExpertConfig) -> bool:
    return expert.device == "cuda" and expert.gpus is None
