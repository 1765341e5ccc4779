"""Which tests run one after another in one process, where pytest-xdist has several: those that share engines, so that
no deployment is started twice; otherwise those of a file of e2e, or of a folder that has the same imports.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from xdist.scheduler import LoadScopeScheduling

E2E = PurePosixPath("tests/e2e")
SHARING = {
    "whole": ["alignment", "echo", "gate", "oracle", "policies", "sampling", "structured", "truncation"],
    "demo_server": ["clients", "compose", "dashboards", "evaluate", "hostile", "parameters", "top"],
    "waiting_server": ["faults", "two_hosts"],
}
"""Fixture of e2e -> the files whose tests use it. `cramped` is used where `whole` is."""
_SHARED = {E2E / f"test_{name}.py": group for group, names in SHARING.items() for name in names}


def group(nodeid: str) -> str:
    file = PurePosixPath(nodeid.partition("::")[0])
    return _SHARED.get(file) or str(file if file.is_relative_to(E2E) else file.parent)


def check(items: list[pytest.Item]) -> None:
    """Raises UsageError if a deployment that is shared would be started in several processes."""
    for fixture in (*SHARING, "cramped"):
        groups = {group(item.nodeid) for item in items if fixture in getattr(item, "fixturenames", ())}
        if len(groups) > 1:
            raise pytest.UsageError(f"tests.support.scheduling: {fixture} is used in {sorted(groups)}")


class Scheduler(LoadScopeScheduling):
    """Gives a process one group after another."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
