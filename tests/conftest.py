"""For all tests. Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports torch. Threads that share a core with engines spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _logging_as_at_start() -> Iterator[None]:
    """A command run inside of a test, or of a fixture before it, configures logging for the whole process: undo it."""
    root, own = logging.getLogger(), logging.getLogger("polylogit")
    own.setLevel(logging.NOTSET)
    root.setLevel(logging.WARNING)
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers


def pytest_configure() -> None:
    """What imports make stays: to look for garbage among it takes a third of the time until the first test."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.scheduling import Scheduler

    config.option.loadscopereorder = False  # in the order of below
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "e2e" not in item.path.parts)  # what takes long comes first
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
