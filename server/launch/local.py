"""A deployment without HTTP: coordinator and experts as in `polylogit serve`, driven from this process in token ids.

Used by `polylogit bench`, `record` and `train`, and by tests that need exact distributions.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from server.config import Config
from server.errors import EngineError, StartError
from server.launch.children import Child, Children
from server.launch.roles import control_channel, start_coordinator, start_expert
from server.launch.sockets import private_directory
from server.request import SequenceRequest
from server.wire.api import (
    API_SOCKET,
    Abort,
    BareTimes,
    Ended,
    FromApi,
    GateLoaded,
    GetStats,
    LoadGate,
    Progress,
    RunBare,
    Submit,
    ToApi,
    TokenDetails,
)
from server.wire.base import Message, Stop
from server.wire.channel import Channel, endpoint
from server.wire.expert import Bare
from server.wire.stats import Stats
from server.wire.supervisor import CoordinatorReady, ExpertUp, RemoteNote, RestartExpert

Answer = TypeVar("Answer", bound=Message)

_END_SECONDS = 15.0
_END_UNREADY_SECONDS = 0.5
_LOOK_SECONDS = 1.0


@dataclass(slots=True)
class Generated:
    """What became of one sequence."""

    tokens: list[int] = field(default_factory=list)
    """T token ids, one a tick."""
    details: list[TokenDetails] = field(default_factory=list)
    """What the sequence asked for beside each token; T, or none."""
    arrivals: list[float] = field(default_factory=list)
    """When each token came, T seconds on the clock of `time.perf_counter`."""
    ended: Ended | None = None
    """How it ended; None while it runs."""


class LocalDeployment:
    """A context manager; entering it starts the processes and waits until all experts are loaded.

    Raises StartError if one of them ends, or if they are not ready within `limits.start_seconds`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._children = Children()
        self._kept = contextlib.ExitStack()
        self._ready = False

    def __enter__(self) -> Self:
        directory = self._kept.enter_context(private_directory())
        self._api: Channel[ToApi, FromApi] = Channel(endpoint(directory, API_SOCKET), ToApi, bind=False)
        self._control = control_channel(directory)
        try:
            self._start(directory)
            self._await_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def children(self) -> list[Child]:
        """The coordinator's process, then those of the experts on this host in order."""
        return list(self._children)

    def close(self) -> None:
        """Stop every process and wait for it."""
        self._control.send(Stop())
        self._children.reap(_END_SECONDS if self._ready else _END_UNREADY_SECONDS)
        self._api.close()
        self._control.close()
        self._kept.close()

    def submit(self, requests: list[SequenceRequest]) -> None:
        self._api.send(Submit(requests))

    def abort(self, sequences: list[int]) -> None:
        self._api.send(Abort(sequences))

    def receive(self, timeout: float | None) -> ToApi | None:
        """The coordinator's next message, None after `timeout` seconds."""
        return self._api.receive(timeout)

    def generate(self, requests: list[SequenceRequest], *, timeout: float = 120.0) -> dict[int, Generated]:
        """Run `requests` to their ends: sequence id -> what it gave. Raises TimeoutError, and EngineError if a
        process ends meanwhile."""
        results = {request.id: Generated() for request in requests}
        self.submit(requests)
        left = len(results)
        deadline = time.monotonic() + timeout
        while left:
            if (message := self.receive(_LOOK_SECONDS)) is not None:
                left -= self._note(message, results)
            else:
                self.check()
            if left and time.monotonic() > deadline:
                raise TimeoutError(f"{left} of {len(requests)} sequences had not ended after {timeout:g} s")
        return results

    def stats(self, *, timeout: float = 30.0) -> Stats:
        """The coordinator's counters. Raises TimeoutError."""
        return self._answer(GetStats(), Stats, timeout)

    def bare(self, experts: list[int], bare: Bare, *, timeout: float = 300.0) -> dict[int, list[float]]:
        """Run engines by themselves, at the same time: expert -> seconds of each step. Raises TimeoutError."""
        return self._answer(RunBare(experts, bare), BareTimes, timeout).seconds

    def load_gate(self, path: Path, *, timeout: float = 60.0) -> None:
        """Have coefficients come from another checkpoint (see `LoadGate`). Raises EngineError if it does not fit, and
        TimeoutError."""
        if problem := self._answer(LoadGate(str(path)), GateLoaded, timeout).problem:
            raise EngineError(problem)

    def check(self) -> None:
        """Raises EngineError if a process has ended or hangs."""
        for message in self._control.drain():
            if isinstance(message, RestartExpert):
                raise EngineError(f"expert {self._config.experts[message.expert].name}: {message.message}")
        self._children.check(EngineError)

    def _answer(self, question: FromApi, kind: type[Answer], timeout: float) -> Answer:
        """Send `question`; the next message of one kind. Raises TimeoutError."""
        self._api.send(question)
        while (message := self.receive(timeout)) is not None:
            if isinstance(message, kind):
                return message
        raise TimeoutError(f"no answer to {type(question).__name__}")

    def _start(self, directory: Path) -> None:
        self._children.add(start_coordinator(self._config, directory))
        for index, expert in enumerate(self._config.experts):
            if expert.address is None:
                self._control.send(ExpertUp(index, 0))
                for child in start_expert(self._config, index, 0, directory):
                    self._children.add(child)

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._config.limits.start_seconds
        note = ""
        while not isinstance(message := self._control.receive(0.1), CoordinatorReady):
            if isinstance(message, RemoteNote):
                note = message.message and f"; expert {self._config.experts[message.expert].name}: {message.message}"
            self._children.check()
            if time.monotonic() > deadline:
                raise StartError(f"not ready after {self._config.limits.start_seconds:g} s{note}")
        self._ready = True

    @staticmethod
    def _note(message: ToApi, results: dict[int, Generated]) -> int:
        """Enter `message` into `results`; how many sequences it ended."""
        now = time.perf_counter()
        match message:
            case Progress(sequences=sequences, tokens=tokens, details=details):
                for sequence, token in zip(sequences, tokens, strict=True):
                    if (result := results.get(sequence)) is not None:
                        result.tokens.append(token)
                        result.arrivals.append(now)
                        if sequence in details:
                            result.details.append(details[sequence])
            case Ended(sequence=sequence) if sequence in results:
                results[sequence].ended = message
                return 1
        return 0
