"""How long lists should be: what longer ones cost against the whole rows that they spare."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tests.bench.exactness.cases import Case
from tests.bench.exactness.driving import Driver
from tests.bench.exactness.errors import Cost, cost
from tests.bench.exactness.recording import Recording

LENGTHS = (32, 64, 128, 256, 512)
ROWS = 8
REPEATS = 60


@dataclass(frozen=True, slots=True)
class Length:
    """Of one length of lists, under one policy."""

    recording: str
    policy: str
    length: int
    greedy: Cost
    sampled: Cost
    """At temperature 1."""
    top_k_ms: float
    """torch.topk of one expert's rows, `ROWS` at a time, on one thread; the fastest of `REPEATS` times, since others
    may use the core meanwhile."""


def measure(recording: Recording, driver: Driver, name: str, case: Case, positions: range, length: int) -> Length:
    """With a `driver` whose lists have that length."""
    return Length(
        recording.name,
        name,
        length,
        cost(driver, case, positions, 0.0),
        cost(driver, case, positions, 1.0),
        _top_k_ms(recording, length),
    )


def _top_k_ms(recording: Recording, length: int) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    for number in range(REPEATS):
        start = ROWS * number % (len(recording.logprobs) - ROWS + 1)
        rows = torch.from_numpy(recording.logprobs[start : start + ROWS, 0].copy())
        began = time.perf_counter()
        torch.topk(rows, length, dim=-1)
        taken.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return 1000 * min(taken)
