"""Deployments of small processes, in place of the real ones."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import children


@pytest.fixture
def small_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small targets for the real processes; signal handlers as they were, afterwards."""
    for name in ("coordinator", "api", "expert"):
        monkeypatch.setattr(f"server.launch.roles.run_{name}", getattr(children, name))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary directories are made meanwhile: a path that is short enough for sockets, which `tmp_path` may not
    be."""
    with tempfile.TemporaryDirectory(prefix="launch-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.fixture
def earlier() -> set[int | None]:
    """Children of this process that other tests left running, such as shared deployments."""
    return {child.pid for child in multiprocessing.active_children()}
