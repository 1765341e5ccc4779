"""No tick waits for a compiler: what ticks of a deployment call is compiled before."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.support.coordinator.compilation import compiled_in_ticks


def test_ticks_compile_nothing(tmp_path: Path) -> None:
    """In a new process: what tests before this one compiled would hide what the warm-up leaves out."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert process.submit(compiled_in_ticks, tmp_path).result() == []
