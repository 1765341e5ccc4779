"""Reads the compose files as Docker Compose would, as far as they use it: variables, merge keys, short volumes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"

_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}")


@dataclass(frozen=True, slots=True)
class Mount:
    """`source`: a file or folder of the host, or the name of a volume."""

    source: str
    target: str

    @property
    def path(self) -> Path | None:
        """The host's, where it is one in the repository; None for a volume and for a path of the user's."""
        return DEPLOY / self.source if self.source.startswith("./") else None


def load(file: str, **environment: str) -> dict[str, Any]:
    """deploy/`file`, its variables replaced by `environment` or their defaults."""

    def value(match: re.Match[str]) -> str:
        default = match["default"]
        if match["name"] not in environment and default is None:
            raise KeyError(f"{file}: {match['name']} has no default")
        return environment.get(match["name"], default)

    text = (DEPLOY / file).read_text(encoding="utf-8")
    return yaml.safe_load(_VARIABLE.sub(value, text))


def mounts(service: dict[str, Any]) -> list[Mount]:
    return [Mount(*volume.split(":")[:2]) for volume in service.get("volumes", [])]


def seconds(duration: str) -> float:
    """ "1m30s" -> 90."""
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smh])", duration))


def dockerfile_copies() -> dict[str, Path]:
    """Place in the CPU image -> what it was copied from, here."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    return {target: ROOT / source for source, target in re.findall(r"^COPY (?!--)(\S+) (\S+)$", text, re.MULTILINE)}
