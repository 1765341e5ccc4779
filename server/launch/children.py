"""Child processes: started in fresh interpreters, watched, and ended; none outlives its parent.

A child says at most one line over a pipe: why it ends badly. Knows nothing of what the children do
(`server.launch.roles`).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from server import logs
from server.errors import PolylogitError, StartError

log = logging.getLogger("polylogit")

_OUTPUT_SECONDS = 1.0
_ENDING_SECONDS = 0.02
_MAX_WORDS = 500
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Child:
    """A process that this one has started."""

    name: str
    """What it is called in messages: "coordinator", "expert math rank 1"."""
    process: BaseProcess
    """Its handle."""
    pipe: Connection
    """Its last words come here."""
    shared_memory: str = ""
    """Files in /dev/shm that may outlive it, a glob pattern; "" for none."""
    output: threading.Thread | None = None
    """Writes on what the process writes, if it is captured."""

    def reason(self) -> str:
        """Why it ended, in one line, if it has said so, or "". To be asked once."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll():
                return self.pipe.recv_bytes().decode()
        return ""

    def last_words(self) -> str:
        """Why or how it ended, in one line that goes after its name. To be asked once."""
        return self.reason() or f"ended with exit code {self.process.exitcode}"

    def end(self) -> None:
        """Kill it, if it has not ended, and remove what is left of it."""
        self.process.kill()
        self.process.join()
        if self.output is not None:
            self.output.join(_OUTPUT_SECONDS)
        if self.shared_memory:
            for path in Path("/dev/shm").glob(self.shared_memory):
                path.unlink(missing_ok=True)


class Children:
    """Processes that are started, watched, and reaped together."""

    def __init__(self, children: Iterable[Child] = ()) -> None:
        self._children = list(children)

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children)

    def add(self, child: Child) -> None:
        self._children.append(child)

    def ended(self) -> Child | None:
        """The first that has ended, if one has."""
        return next((child for child in self._children if not child.process.is_alive()), None)

    def check(self, error: type[PolylogitError] = StartError) -> None:
        """Raises `error` with its name and last words if one has ended."""
        if (child := self.ended()) is not None:
            raise error(f"{child.name}: {child.last_words()}")

    def wait(self, seconds: float) -> None:
        """Return when one ends, after `seconds` at the latest."""
        ending = multiprocessing.connection.wait([child.process.sentinel for child in self._children], seconds)
        if ending and self.ended() is None:
            # Its files are closed, but the system is not done with it: a GPU's memory may take a second to be freed.
            time.sleep(min(seconds, _ENDING_SECONDS))

    def reap(self, seconds: float) -> None:
        """End them all: by themselves within `seconds`, or else by force. None is left afterwards."""
        deadline = time.monotonic() + seconds
        for child in self._children:
            child.process.join(max(0.0, deadline - time.monotonic()))
        for child in self._children:
            child.end()
        self._children.clear()


def spawn(name: str, run: Callable[[], None], *, capture: bool = False, shared_memory: str = "") -> Child:
    """Start `run()` in a fresh interpreter; it must be a module's function, or a `functools.partial` of one.

    `capture`: what it writes, by whatever means, becomes JSON lines. `shared_memory`: as in `Child`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    written, output = context.Pipe(duplex=False) if capture else (None, None)
    process = context.Process(target=_main, args=(theirs, output, os.getpid(), run), name=name)
    process.start()
    theirs.close()
    if output is not None:
        output.close()
    relay = None if written is None else logs.relay(written, name)
    return Child(name, process, ours, shared_memory, relay)


def _main(pipe: Connection, output: Connection | None, parent: int, run: Callable[[], None]) -> None:
    """What a child does first: die with its parent, leave signals to it, and say in one line why it ends badly."""
    if output is not None:
        logs.write_into(output)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    code = 1
    try:
        run()
        code = 0
    except PolylogitError as error:
        pipe.send_bytes(str(error).encode())
    except Exception as error:
        log.debug("failed", exc_info=True)
        pipe.send_bytes(f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_WORDS]}".encode())
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process as multiprocessing would, but for the interpreter's teardown: with torch and vLLM in it that
    takes seconds, and threads of a broken engine could keep it from ending at all."""
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
