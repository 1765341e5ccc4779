"""Whole rows between processes of one host: memory that the coordinator makes, one piece for each expert, and the
expert writes to while the coordinator waits.

It has no name in any file system: the expert opens it by its place among the coordinator's open files, and it is gone
with the last of the two. Pages take memory once they are written to.
"""

from __future__ import annotations

import logging
import mmap
import os

import numpy as np
import numpy.typing as npt

from server.logs import fields

_log = logging.getLogger("polylogit.expert")

Float32 = npt.NDArray[np.float32]


class RowMemory:
    """Room for `rows` rows of `vocabulary` numbers."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        self._file = os.memfd_create("polylogit-rows", os.MFD_CLOEXEC)
        os.ftruncate(self._file, rows * vocabulary * 4)
        self._vocabulary = vocabulary
        self.rows: Float32 = _mapped(self._file, vocabulary)
        """float32[rows, V]."""

    @property
    def path(self) -> str:
        """Where another process of the same user opens it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Give the memory back, once nobody looks at its rows any more."""
        os.close(self._file)


class RowWriter:
    """The other side of a `RowMemory`, one after another."""

    def __init__(self) -> None:
        self._path = ""
        self._rows: Float32 | None = None

    def open(self, path: str, vocabulary: int) -> Float32 | None:
        """The memory at `path` as float32[rows, V]; None where it cannot be opened."""
        if path != self._path:
            self._path, self._rows = path, None
            try:
                self._rows = _opened(path, vocabulary)
            except (OSError, ValueError) as error:
                _log.warning("no shared memory, rows take the socket", extra=fields(reason=str(error)))
        return self._rows


def _opened(path: str, vocabulary: int) -> Float32:
    file = os.open(path, os.O_RDWR)
    try:
        return _mapped(file, vocabulary)
    finally:
        os.close(file)


def _mapped(file: int, vocabulary: int) -> Float32:
    return np.frombuffer(mmap.mmap(file, 0), np.float32).reshape(-1, vocabulary)
