"""Whole rows in memory that two processes share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.wire.shared_rows import RowMemory, RowWriter
from tests.support.paths import ROOT

VOCABULARY = 1000
WRITE = """
import sys
from server.wire.shared_rows import RowWriter

rows = RowWriter().open(sys.argv[1], 1000)
print(rows.shape)
rows[2] = range(1000)
"""


@pytest.fixture
def memory() -> Iterator[RowMemory]:
    made = RowMemory(5, VOCABULARY)
    yield made
    made.close()


def write(path: str) -> str:
    """What another process says of the memory at `path`, having written to it."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, path], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_another_process_writes_what_this_one_reads(memory):
    assert memory.rows.shape == (5, VOCABULARY) and memory.rows.dtype == np.float32
    assert not memory.rows.any()
    assert write(memory.path) == "(5, 1000)"
    np.testing.assert_array_equal(memory.rows[2], np.arange(VOCABULARY))
    assert not memory.rows[[0, 1, 3, 4]].any()


def test_it_has_no_name_in_a_file_system_and_children_do_not_inherit_it(memory):
    assert str(Path(memory.path).readlink()).startswith("/memfd:")
    assert not os.get_inheritable(int(Path(memory.path).name))


def test_it_is_gone_once_it_is_closed():
    memory = RowMemory(2, VOCABULARY)
    path, rows = memory.path, memory.rows
    memory.close()
    assert RowWriter().open(path, VOCABULARY) is None
    rows[0] = 1  # whoever still looks at it may


def test_a_writer_keeps_what_it_has_opened(memory):
    writer = RowWriter()
    first = writer.open(memory.path, VOCABULARY)
    assert first is not None and writer.open(memory.path, VOCABULARY) is first
    first[4, 7] = 3.5
    assert memory.rows[4, 7] == 3.5


def test_a_writer_goes_on_to_other_memory(memory):
    writer, other = RowWriter(), RowMemory(1, VOCABULARY)
    assert writer.open(memory.path, VOCABULARY) is not None
    rows = writer.open(other.path, VOCABULARY)
    assert rows is not None and rows.shape == (1, VOCABULARY)
    rows[0] = 2
    assert (other.rows == 2).all() and not memory.rows.any()
    other.close()


@pytest.mark.parametrize("path", ["/proc/self/fd/999999", "/proc/0/fd/3", "/no/such/file"])
def test_a_path_that_cannot_be_opened_gives_nothing(memory, path):
    writer = RowWriter()
    assert writer.open(path, VOCABULARY) is None
    assert writer.open(path, VOCABULARY) is None
    assert writer.open(memory.path, VOCABULARY) is not None
