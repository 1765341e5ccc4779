"""A deployment served for the time of a command: a supervisor in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from server import logs
from server.config import LoggingConfig, load_config, with_gate
from server.errors import StartError
from server.launch.check import check
from server.launch.children import Child, spawn
from server.launch.supervisor import Supervisor

_END_SECONDS = 60.0


@contextlib.contextmanager
def served(config: Path, *, gate: Path | None = None, start_seconds: float = 600.0) -> Iterator[str]:
    """The URL of a server over the file `config`, with the checkpoint `gate` instead of its own.

    Raises StartError with the server's last words if it ends before it is ready.
    """
    announced, announce = multiprocessing.Pipe(duplex=False)
    with announced:
        with announce:
            server = spawn("the server", partial(run_server, config, gate, announce))
        try:
            yield _await_ready(server, announced, start_seconds)
        finally:
            server.process.terminate()
            server.process.join(_END_SECONDS)
            server.end()


def run_server(config: Path, gate: Path | None, announce: Connection) -> None:
    """Serve until SIGTERM, without a word: its URL goes to `announce` when it answers. Raises StartError."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends this process while there is nothing to end in order
    _be_silent()
    chosen = load_config(config) if gate is None else with_gate(load_config(config), gate)
    http = msgspec.structs.replace(chosen.http, port=0)
    chosen = msgspec.structs.replace(chosen, http=http, logging=LoggingConfig("text", "warning"))
    logs.configure(chosen.logging, "supervisor")
    check(chosen)
    Supervisor(chosen, lambda url: announce.send_bytes(url.encode())).run()


def _await_ready(server: Child, announced: Connection, seconds: float) -> str:
    """The URL. Raises StartError."""
    if not multiprocessing.connection.wait([announced, server.process.sentinel], seconds):
        raise StartError(f"the server was not ready after {seconds:g} s")
    try:
        return announced.recv_bytes().decode()
    except EOFError:
        server.process.join(_END_SECONDS)
        raise StartError(server.reason() or f"the server ended with exit code {server.process.exitcode}") from None


def _be_silent() -> None:
    """What this process and its children write goes nowhere: the command that is served has the terminal."""
    with Path(os.devnull).open("wb") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
