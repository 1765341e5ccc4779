"""For all tests. Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logging_as_at_start() -> Iterator[None]:
    """A command run inside of a test, or of a fixture before it, configures logging for the whole process: undo it."""
    root, own = logging.getLogger(), logging.getLogger("polylogit")
    own.setLevel(logging.NOTSET)
    root.setLevel(logging.WARNING)
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
