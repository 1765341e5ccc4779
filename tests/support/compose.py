"""Reads the compose files as Docker Compose would, as far as they use it: variables, merge keys, volumes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.dockerfile import stages
from tests.support.paths import ROOT

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
    return _filled(yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8")), environment)


def _filled(node: Any, environment: dict[str, str]) -> Any:
    """`node` with variables replaced. Raises KeyError for one without a value and a default."""
    if isinstance(node, dict):
        return {key: _filled(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, environment) for value in node]
    if not isinstance(node, str):
        return node
    return _VARIABLE.sub(
        lambda found: environment[found["name"]] if found["default"] is None else environment.get(*found.groups()), node
    )


def mounts(service: dict[str, Any]) -> list[Mount]:
    return [_mount(volume) for volume in service.get("volumes", [])]


def _mount(volume: str | dict[str, Any]) -> Mount:
    """In the long form a path may begin with anything; in the short one, what has no slash before it is a volume."""
    if isinstance(volume, str):
        return Mount(*volume.split(":")[:2])
    source = volume["source"]
    relative = volume["type"] == "bind" and not source.startswith(("/", "./"))
    return Mount(f"./{source}" if relative else source, volume["target"])


def seconds(duration: str) -> float:
    """ "1m30s" -> 90."""
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smh])", duration))


def command(service: dict[str, Any]) -> list[str]:
    """Its command, with the container's places replaced by what is mounted or copied there."""
    return [str(here(service, argument)) if argument.startswith("/") else argument for argument in service["command"]]


def here(service: dict[str, Any], place: str) -> Path:
    """What lies at `place` in the service's container. Raises KeyError if nothing of the repository does."""
    places = _copied() | {mount.target: mount.path for mount in mounts(service) if mount.path is not None}
    for target, path in places.items():
        if place == target or place.startswith(f"{target}/"):
            return path / place[len(target) :].lstrip("/")
    raise KeyError(place)


def _copied() -> dict[str, Path]:
    """Place in the CPU image -> what of the repository is copied there."""
    return {target: ROOT / source for (source,), target in stages()["cpu"].copied()}
