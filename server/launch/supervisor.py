"""The supervisor: starts every process, waits for them with a time limit, replaces an expert that died, and shuts down
in order (stop admitting, drain, abort, reap). The process that `polylogit serve` is.

What its children say of themselves comes through the coordinator's sockets, but for the reason why one ends.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.config import Config
from server.errors import StartError
from server.launch.children import Child, Children
from server.launch.restarts import Restarts
from server.launch.roles import control_channel, start_api, start_coordinator, start_expert
from server.launch.sockets import bound, http_url, private_directory
from server.wire.base import Stop
from server.wire.channel import Channel
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
_REAP_UNREADY_SECONDS = 0.5
_BACKLOG = 1024


@dataclass(slots=True)
class _Expert:
    """An expert on this host, and its processes."""

    restarts: Restarts
    """Whether and when it may be started again."""
    generation: int = 0
    """Counts its restarts."""
    ranks: Children = field(default_factory=Children)
    """One process for each tensor-parallel rank; none while it is down."""
    due: float | None = None
    """When it is started again, on the clock of `time.monotonic`."""


class Supervisor:
    """Runs a deployment. `on_ready(url)` is called once it answers."""

    _directory: Path
    _control: Channel[ToSupervisor, FromSupervisor]

    def __init__(self, config: Config, on_ready: Callable[[str], None]) -> None:
        self._config = config
        self._on_ready = on_ready
        self._core = Children()  # coordinator and api: without one of them there is no deployment
        self._experts = {
            index: _Expert(Restarts(config.limits.restarts_per_hour))
            for index, expert in enumerate(config.experts)
            if expert.address is None
        }
        self._notes: dict[int, str] = {}  # of experts on other hosts: why they are not connected
        self._stopping = False
        self._drained = False
        self._ready = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError if the deployment cannot start or cannot go on."""
        http = self._config.http
        with bound("http", http.host, http.port) as listener, private_directory() as directory:
            listener.listen(_BACKLOG)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            self._directory = directory
            self._control = control_channel(directory)
            try:
                self._start(listener)
                self._await_ready()
                if self._ready:
                    self._on_ready(http_url(*listener.getsockname()[:2]))
                while not self._stopping:
                    self._look_after_children()
                self._drain()
            finally:
                self._reap()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    # --- start ----------------------------------------------------------------------------------------------------

    def _start(self, listener: socket.socket) -> None:
        self._core.add(start_coordinator(self._config, self._directory))
        self._core.add(start_api(self._config, self._directory, listener))
        for index in self._experts:
            self._start_expert(index)

    def _start_expert(self, index: int) -> None:
        expert = self._experts[index]
        self._control.send(ExpertUp(index, expert.generation))
        expert.ranks = start_expert(self._config, index, expert.generation, self._directory)

    def _await_ready(self) -> None:
        """Return when everything is loaded, or a signal has come. Raises StartError after `limits.start_seconds`."""
        seconds = self._config.limits.start_seconds
        deadline = time.monotonic() + seconds
        while not self._ready and not self._stopping:
            if time.monotonic() > deadline:
                notes = "".join(f"; {note}" for note in self._notes.values())
                raise StartError(f"not ready after {seconds:g} s (limits.start_seconds){notes}")
            self._look_after_children()

    # --- run ------------------------------------------------------------------------------------------------------

    def _look_after_children(self) -> None:
        """Hear the coordinator, notice dead children, start experts that are due; then wait a moment."""
        for message in self._control.drain():
            match message:
                case CoordinatorReady():
                    self._ready = True
                case RestartExpert(expert=index, generation=generation, message=why):
                    self._kill_expert(index, generation, why)
                case RemoteNote(expert=index, message=why):
                    self._note(index, why)
                case Drained():
                    self._drained = True
        self._core.check()
        for index, expert in self._experts.items():
            if (child := expert.ranks.ended()) is not None:
                self._replace_expert(index, child)
            if expert.due is not None and time.monotonic() >= expert.due and not self._stopping:
                expert.due = None
                expert.generation += 1
                self._start_expert(index)
        self._children().wait(_POLL_SECONDS)

    def _note(self, index: int, why: str) -> None:
        """Log news of an expert on another host, which the coordinator connects to by itself."""
        chosen = self._config.experts[index]
        if why:
            self._notes[index] = f"expert {chosen.name}: {why}"
            log.warning("%s; trying again", self._notes[index])
        else:
            self._notes.pop(index, None)
            log.info("expert %s: connected to %s", chosen.name, chosen.address)

    def _kill_expert(self, index: int, generation: int, why: str) -> None:
        """Kill an expert that hangs; what follows is as if it had died. An earlier process of it is not meant."""
        expert = self._experts[index]
        if generation == expert.generation and (first := next(iter(expert.ranks), None)) is not None:
            log.error("expert %s: %s; killing it", self._config.experts[index].name, why)
            first.process.kill()

    def _replace_expert(self, index: int, child: Child) -> None:
        """A process of an expert has ended: say so, and plan another one, later the more often it happened."""
        expert = self._experts[index]
        expert.ranks.reap(0.0)
        words = child.last_words()
        if not self._ready:
            raise StartError(f"{child.name}: {words}")
        self._control.send(ExpertDown(index, expert.generation, words))
        if self._stopping:
            return
        now = time.monotonic()
        if (pause := expert.restarts.pause(now)) is None:
            limit = self._config.limits.restarts_per_hour
            times = "once" if limit == 1 else f"{limit} times"
            raise StartError(f"{child.name}: {words}; restarted {times} in an hour, giving up")
        log.error("%s: %s; restarting in %.0f s", child.name, words, pause)
        expert.due = now + pause

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

    def _reap(self) -> None:
        """End every child; nothing is left running."""
        self._control.send(Stop())
        self._children().reap(_REAP_SECONDS if self._ready else _REAP_UNREADY_SECONDS)
        self._control.close()

    def _children(self) -> Children:
        """All that run."""
        return Children([*self._core, *(child for expert in self._experts.values() for child in expert.ranks)])
