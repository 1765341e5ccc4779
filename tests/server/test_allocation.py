"""Memory of large arrays is kept from one to the next."""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from server.allocation import keep_freed_memory

MEGABYTES, TIMES = 24, 20


def faults(keep: bool) -> int:
    """Pages that are mapped while large arrays come and go. To be called in a process of its own."""
    if keep:
        keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        first, second = np.ones(MEGABYTES * 2**20, np.uint8), np.ones(MEGABYTES * 2**20, np.uint8)
        del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_arrays_of_a_step_take_the_pages_of_the_last_one():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as process:
        kept, anew = process.submit(faults, True).result(), process.submit(faults, False).result()
    assert kept < anew / 2
