"""Processes as /proc shows them (Linux)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_STATE, _PARENT, _STARTED = 0, 1, 19  # places in /proc/PID/stat after the name


def descendants(pid: int) -> set[int]:
    """Children of `pid`, their children, and so on; zombies are not counted."""
    parents = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found: set[int] = set()
    growing = {pid}
    while growing:
        growing = {
            child
            for child, stat in parents.items()
            if stat and stat[_STATE] != "Z" and int(stat[_PARENT]) in growing and child not in found
        }
        found |= growing
    return found


def alive(pid: int) -> bool:
    stat = _stat(pid)
    return bool(stat) and stat[_STATE] != "Z"


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def oldest_first(pids: Iterable[int]) -> list[int]:
    return sorted(pids, key=lambda pid: (int((_stat(pid) or ["0"] * 20)[_STARTED]), pid))


def has_mapped(pid: int, part: str) -> bool:
    """Whether a file with `part` in its path is mapped into the process: a library that it has loaded."""
    try:
        return part in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
