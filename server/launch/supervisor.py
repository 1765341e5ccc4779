"""The supervisor: starts every process by name, waits for them with a time limit, replaces a dead expert, and shuts
down in order (stop admitting, drain, abort, reap). The process that `polylogit serve` is.

Children send at most one line over a pipe: why they end. Everything else goes through the coordinator's sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from server import logs
from server.config import Config
from server.errors import PolylogitError, StartError
from server.expert.ranks import meeting
from server.placement import Placement, expert_cpus, expert_gpus
from server.wire.base import Stop
from server.wire.channel import Channel, endpoint
from server.wire.supervisor import (
    CoordinatorReady,
    Drain,
    Drained,
    ExpertDown,
    ExpertUp,
    FromSupervisor,
    RemoteNote,
    RestartExpert,
    ToSupervisor,
)

log = logging.getLogger("polylogit")

_POLL_SECONDS = 0.1
_REAP_SECONDS = 10.0
_OUTPUT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Child:
    """A process that the supervisor started, and the pipe for its last words. `meeting`: the name of the file at which
    it meets the other tensor-parallel ranks of its expert, "" without others. `output`: the thread that writes on what
    the process writes, if it is captured."""

    name: str
    process: BaseProcess
    pipe: Connection
    meeting: str = ""
    output: threading.Thread | None = None

    def last_words(self) -> str:
        """Why it ended, in one line."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll():
                return self.pipe.recv_bytes().decode()
        return f"ended with exit code {self.process.exitcode}"


class Supervisor:
    """Runs a deployment. `on_ready(url)` is called once it answers."""

    def __init__(self, config: Config, on_ready: Callable[[str], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._experts: dict[int, list[Child]] = {}  # one process for each tensor-parallel rank
        self._generation = [0] * len(config.experts)
        self._restart_at: dict[int, float] = {}
        self._notes: dict[int, str] = {}  # of experts on other hosts: why they are not connected
        self._restarts: list[deque[float]] = [deque() for _ in config.experts]
        self._stopping = False
        self._drained = False
        self._ready = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError if the deployment cannot start or cannot go on."""
        with _listener(self._config) as listener, private_directory() as directory:
            self._directory = directory
            self._url = _url(*listener.getsockname()[:2])
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            self._control: Channel[ToSupervisor, FromSupervisor] = Channel(
                endpoint(directory, "control"), ToSupervisor, bind=False
            )
            try:
                self._start(listener)
                self._watch()
                self._drain()
            finally:
                self._reap()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    # --- start ----------------------------------------------------------------------------------------------------

    def _start(self, listener: socket.socket) -> None:
        capture = self._config.logging.format == "json"
        self._coordinator = spawn("coordinator", run_coordinator, self._config, self._directory, capture=capture)
        self._api = spawn("api", run_api, self._config, endpoint(self._directory, "api"), listener, capture=capture)
        for index, expert in enumerate(self._config.experts):
            if expert.address is None:
                self._start_expert(index)
        deadline = time.monotonic() + self._config.limits.start_seconds
        while not self._ready and not self._stopping:
            if time.monotonic() > deadline:
                raise StartError(
                    f"not ready after {self._config.limits.start_seconds:g} s (limits.start_seconds)"
                    + "".join(f"; {note}" for note in self._notes.values())
                )
            self._look_after_children()
            time.sleep(_POLL_SECONDS)
        if self._ready:
            self._on_ready(self._url)

    def _start_expert(self, expert: int) -> None:
        generation = self._generation[expert]
        self._control.send(ExpertUp(expert, generation))
        self._experts[expert] = start_expert(self._config, expert, generation, self._directory)

    # --- run ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopping:
            self._look_after_children()
            time.sleep(_POLL_SECONDS)

    def _look_after_children(self) -> None:
        """Hear the coordinator, notice dead children, start experts that are due."""
        for message in self._control.drain():
            match message:
                case CoordinatorReady():
                    self._ready = True
                case RestartExpert(expert=expert, generation=generation, message=why):
                    self._kill_expert(expert, generation, why)
                case RemoteNote(expert=expert, message=why):
                    self._note(expert, why)
                case Drained():
                    self._drained = True
        for child in (self._coordinator, self._api):
            if not child.process.is_alive():
                raise StartError(f"{child.name}: {child.last_words()}")
        for expert, ranks in list(self._experts.items()):
            if dead := [child for child in ranks if not child.process.is_alive()]:
                self._bury_expert(expert, dead[0])
        for expert, due in list(self._restart_at.items()):
            if time.monotonic() >= due and not self._stopping:
                del self._restart_at[expert]
                self._generation[expert] += 1
                self._start_expert(expert)

    def _note(self, expert: int, why: str) -> None:
        """Log news of an expert on another host, which the coordinator connects to by itself."""
        chosen = self._config.experts[expert]
        if why:
            self._notes[expert] = f"expert {chosen.name}: {why}"
            log.warning("%s; trying again", self._notes[expert])
        else:
            self._notes.pop(expert, None)
            log.info("expert %s: connected to %s", chosen.name, chosen.address)

    def _kill_expert(self, expert: int, generation: int, why: str) -> None:
        if expert in self._experts and generation == self._generation[expert]:
            log.error("expert %s: %s; killing it", self._config.experts[expert].name, why)
            self._experts[expert][0].process.kill()

    def _bury_expert(self, expert: int, child: Child) -> None:
        """A process of an expert has ended: say so, and plan another one, later the more often it happened."""
        for other in self._experts.pop(expert):
            end(other)
        words = child.last_words()
        if not self._ready:
            raise StartError(f"{child.name}: {words}")
        self._control.send(ExpertDown(expert, self._generation[expert], words))
        if self._stopping:
            return
        now = time.monotonic()
        recent = self._restarts[expert]
        while recent and now - recent[0] > 3600:
            recent.popleft()
        if len(recent) >= self._config.limits.restarts_per_hour:
            raise StartError(f"{child.name}: {words}; restarted {len(recent)} times in an hour, giving up")
        delay = min(2.0 ** len(recent) - 1, 30.0)
        recent.append(now)
        log.error("%s: %s; restarting in %.0f s", child.name, words, delay)
        self._restart_at[expert] = now + delay

    # --- stop -----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Let running requests finish within the grace period."""
        if not self._ready:
            return
        grace = self._config.limits.grace_seconds
        log.info("shutting down, at most %g s for running requests", grace)
        self._control.send(Drain(grace))
        deadline = time.monotonic() + grace + _REAP_SECONDS
        while not self._drained and time.monotonic() < deadline:
            self._look_after_children()
            time.sleep(_POLL_SECONDS)

    def _reap(self) -> None:
        """End every child; nothing is left running."""
        self._control.send(Stop())
        children = [child for name in ("_coordinator", "_api") if (child := getattr(self, name, None))]
        children += [child for ranks in self._experts.values() for child in ranks]
        deadline = time.monotonic() + (_REAP_SECONDS if self._ready else 0.5)
        for child in children:
            child.process.join(max(0.0, deadline - time.monotonic()))
        for child in children:
            end(child)
        self._control.close()


def spawn(name: str, target: Callable[..., None], *arguments: Any, capture: bool = False) -> Child:
    """Start `target(*arguments)` in a fresh interpreter. `capture`: what it writes, by whatever means, becomes JSON
    lines."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    written, output = context.Pipe(duplex=False) if capture else (None, None)
    process = context.Process(target=_child, args=(theirs, output, os.getpid(), target, arguments), name=name)
    process.start()
    theirs.close()
    if written is None or output is None:
        return Child(name, process, ours)
    output.close()
    return Child(name, process, ours, output=logs.relay(written, name))


def end(child: Child) -> None:
    """Kill a process that has not ended, and remove what vLLM leaves behind of CPU ranks: their shared memory."""
    child.process.kill()
    child.process.join()
    if child.output is not None:
        child.output.join(_OUTPUT_SECONDS)
    if child.meeting:
        for path in Path("/dev/shm").glob(f"*{child.meeting}-*cpushm_*"):
            path.unlink(missing_ok=True)


def start_expert(
    config: Config, expert: int, generation: int, directory: Path, listener: socket.socket | None = None
) -> list[Child]:
    """Start the processes of an expert, one for each tensor-parallel rank. `listener`: where the first of them awaits
    a coordinator on another host."""
    chosen = config.experts[expert]
    size = chosen.tensor_parallel_size
    cores = expert_cpus(config)[expert]
    children = []
    for rank in range(size):
        own = cores[rank::size] or cores if cores else None
        place = Placement(expert, generation, rank, own, expert_gpus(config)[expert])
        name, door = expert_name(config, place), None if rank else listener
        child = spawn(name, run_expert, config, place, directory, door, capture=config.logging.format == "json")
        children.append(replace(child, meeting=meeting(directory, place).name if size > 1 else ""))
    return children


def expert_name(config: Config, place: Placement) -> str:
    """What a worker process is called."""
    chosen = config.experts[place.expert]
    return f"expert {chosen.name}" + (f" rank {place.rank}" if chosen.tensor_parallel_size > 1 else "")


def _child(
    pipe: Connection, output: Connection | None, parent: int, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
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
        target(*arguments)
        code = 0
    except PolylogitError as error:
        pipe.send_bytes(str(error).encode())
    except Exception as error:
        log.debug("%s failed", target.__name__, exc_info=True)
        pipe.send_bytes(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".encode())
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process as multiprocessing would, but for the interpreter's teardown: with torch and vLLM in it that
    takes seconds, and threads of a broken engine could keep it from ending at all."""
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_coordinator(config: Config, directory: Path) -> None:
    logs.configure(config.logging, "coordinator")
    from server.coordinator.process import run

    run(config, directory)


def run_api(config: Config, address: str, listener: socket.socket) -> None:
    logs.configure(config.logging, "api")
    from server.api.process import run

    run(config, address, listener)


def run_expert(config: Config, place: Placement, directory: Path, listener: socket.socket | None) -> None:
    logs.configure(config.logging, expert_name(config, place))
    from server.expert.process import run

    run(config, place, directory, listener)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _listener(config: Config) -> Iterator[socket.socket]:
    """The HTTP socket, bound before anything else is started. Raises StartError if that fails."""
    with bound("http", config.http.host, config.http.port) as listener:
        listener.listen(1024)
        yield listener


@contextlib.contextmanager
def bound(what: str, host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket bound to `host`:`port`, not yet listening. Raises StartError that names `what` it is for."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"{what}: cannot listen on {host}:{port}: {error.strerror}") from None
        yield listener


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for the sockets that only this user can enter; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="polylogit-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
