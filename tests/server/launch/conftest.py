"""Deployments of small processes, in place of the real ones."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator

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
def earlier() -> set[int | None]:
    """Children of this process that other tests left running, such as shared deployments."""
    return {child.pid for child in multiprocessing.active_children()}
