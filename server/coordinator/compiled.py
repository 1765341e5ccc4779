"""Compilation of the coordinator's inner loops with Numba (which vLLM brings along).

A tick of a small model takes about a millisecond, and NumPy spends a few microseconds on each call whatever the size:
the hundred calls that fusing a row takes cost more than the arithmetic. Written as plain loops over rows and compiled,
the same tick is several times cheaper, and the loops say what they do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# Compiled code is kept in NUMBA_CACHE_DIR, or beside the sources, and is trusted like them; where that is read-only,
# each start compiles anew.
_CACHE = os.access(numba.config.CACHE_DIR or Path(__file__).parent, os.W_OK)


def compiled(function: Function) -> Function:
    """`function` in machine code, compiled at its first call with arguments of some types."""
    decorated: Function = numba.njit(cache=_CACHE, error_model="numpy")(function)
    return decorated
