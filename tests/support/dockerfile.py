"""What the Dockerfile says, stage by stage."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import dataclass

from dockerfile_parse import DockerfileParser

from tests.support.paths import ROOT


@dataclass(frozen=True)
class Stage:
    """`instructions`: (name, value) in order. `base`: an image, or the name of another stage."""

    base: str
    instructions: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [value for instruction, value in self.instructions if instruction == name]

    def words(self, name: str) -> list[str]:
        """The last instruction of that name in its exec form."""
        return [str(word) for word in json.loads(self.all(name)[-1])]

    def copied(self) -> list[tuple[list[str], str]]:
        """What comes from the repository: (sources, target)."""
        found = [shlex.split(value) for value in self.all("COPY")]
        return [(words[:-1], words[-1]) for words in found if not words[0].startswith("--from")]


def stages() -> dict[str, Stage]:
    """By name, in order; variables in bases have their defaults."""
    parser = DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes()))
    found: dict[str, Stage] = {}
    for line in parser.structure:
        name, value = line["instruction"], line["value"]
        if name == "FROM":
            stage = Stage(parser.parent_images[len(found)], [])
            found[value.split(" AS ")[1]] = stage
        elif found and name != "COMMENT":
            stage.instructions.append((name, value))
    return found
