"""A deployment served for the time of a command: `polylogit serve` in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from server.errors import StartError

_READY = re.compile(r"is ready on (http://\S+)")
_END_SECONDS = 60.0
_LOOK_SECONDS = 0.1


@contextlib.contextmanager
def served(config: Path, *, gate: Path | None = None, start_seconds: float = 600.0) -> Iterator[str]:
    """The URL of a server over the file `config`, with the checkpoint `gate` instead of its own.

    Raises StartError with the server's last words if it ends before it is ready.
    """
    logging = [
        "--log-level",
        "warning",
        "--log-format",
        "text",
    ]  # as JSON the line that it is ready would be a log line
    command = [sys.executable, "-m", "server.cli", *logging, "serve", str(config), "--port", "0"]
    if gate is not None:
        command += ["--gate", str(gate)]
    with tempfile.TemporaryDirectory(prefix="polylogit-") as directory:
        output, errors = Path(directory, "stdout"), Path(directory, "stderr")
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            yield _await_ready(process, output, errors, start_seconds)
        finally:
            _end(process)


def _await_ready(process: subprocess.Popen[bytes], output: Path, errors: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not (match := _READY.search(output.read_text(encoding="utf-8"))):
        if process.poll() is not None:
            raise StartError(_last_words(errors) or f"the server ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise StartError(f"the server was not ready after {seconds:g} s")
        time.sleep(_LOOK_SECONDS)
    return match[1]


def _last_words(errors: Path) -> str:
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("polylogit: error: ") if lines else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
