"""Compiled code is kept for one state of the sources: all of the package's, since a function's machine code also holds
what it calls and which field of a tuple it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TUPLES = "from typing import NamedTuple\n\n\nclass Pair(NamedTuple):\n    {}: int\n    {}: int\n"
READER = """
from {package}.compiled import compiled
from {package}.tuples import Pair

@compiled
def wanted(pair: Pair) -> int:
    return pair.wanted
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a copy of `compiled`, a function, and a tuple that it reads."""
    folder = tmp_path / "copied"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "compiled.py").write_text((ROOT / "server" / "coordinator" / "compiled.py").read_text())
    (folder / "reader.py").write_text(READER.format(package="copied"))
    return folder


def read(package: Path, *fields: str) -> tuple[str, int]:
    """What the function says, in a process of its own, of a tuple of 1 and 2 with these fields; and how often it was
    found compiled."""
    (package / "tuples.py").write_text(TUPLES.format(*fields))
    program = (
        "from copied.reader import Pair, wanted\n"
        "answer = wanted(Pair(1, 2))\n"
        "print(answer, sum(wanted.stats.cache_hits.values()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=package.parent,
        env={**environment, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, hits = done.stdout.split()
    return answer, int(hits)


def test_what_is_kept_is_used_until_another_file_of_the_package_changes(package: Path) -> None:
    assert read(package, "wanted", "other") == ("1", 0)
    assert read(package, "wanted", "other") == ("1", 1)
    assert read(package, "other", "wanted") == ("2", 0)
