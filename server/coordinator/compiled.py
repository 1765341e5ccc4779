"""Compilation of the coordinator's inner loops with Numba (which vLLM brings along).

A tick of a small model takes about a millisecond, and NumPy spends a few microseconds on each call whatever the size:
the hundred calls that fusing a row takes cost more than the arithmetic. Written as plain loops over rows and compiled,
the same tick is several times cheaper, and the loops say what they do.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def sources_digest(package: Path) -> str:
    """What tells one state of a package's sources from another: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(package.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _set_cache() -> bool:
    """Have Numba keep compiled code, trusted like the sources, in NUMBA_CACHE_DIR or beside them, in a folder for each
    state of the package: Numba itself looks at a function's own file only, not at those of the functions that it calls
    and of the tuples whose fields it reads. False where that is read-only: each start compiles anew.
    """
    package = Path(__file__).parent
    base = Path(numba.config.CACHE_DIR or package / "__pycache__")
    numba.config.CACHE_DIR = str(base / f"numba-{sources_digest(package)}")
    return os.access(base if base.exists() else base.parent, os.W_OK)


_CACHE = _set_cache()


def compiled(function: Function) -> Function:
    """`function` in machine code, compiled at its first call with arguments of some types."""
    decorated: Function = numba.njit(cache=_CACHE, error_model="numpy")(function)
    return decorated
