"""Files as wholes: their digests, and writing that an interruption cannot leave half done."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def sha256_file(path: Path) -> str:
    """sha256 (hexadecimal) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_parts(parts: Iterable[bytes]) -> str:
    """sha256 (hexadecimal) over parts, each after its length: moving a border between two of them changes it."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also when the power fails; its directory is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
