"""Where a worker process stands: which expert, which of its tensor-parallel ranks, on which cores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """`expert` is its index, `generation` counts its restarts. `rank` of `tensor_parallel_size`; `port` on 127.0.0.1 is
    where the ranks meet (0 with one rank). `cpus`: the cores of this process, None for wherever; `gpus`: indices of
    the expert's GPUs."""

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
