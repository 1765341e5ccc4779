"""Prometheus's own checker, of Debian's package `prometheus`."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def run(*arguments: str, stdin: str | None = None) -> str:
    """What `promtool` prints. Fails the test with it where promtool finds a fault; skips where there is none."""
    if (program := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
