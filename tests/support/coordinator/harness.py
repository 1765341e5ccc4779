"""A deployment in one process: a real coordinator and real workers in threads, over real sockets and fake engines.

The test is the api and the supervisor. On leaving, every submitted sequence must have had exactly one terminal message.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from server.config import Config, parse_config
from server.coordinator.process import CoordinatorProcess
from server.coordinator.warmup import warm_up
from server.errors import EngineError
from server.expert.worker import Projector, Worker
from server.placement import expert_socket
from server.remote.agreement import list_length
from server.request import SequenceRequest
from server.wire.api import (
    Abort,
    Ended,
    FromApi,
    GetStats,
    Progress,
    Recorded,
    SequenceTiming,
    Status,
    Submit,
    ToApi,
    TokenDetails,
)
from server.wire.base import Stop
from server.wire.channel import Channel, endpoint
from server.wire.expert import FromExpert, GetRows, ToExpert
from server.wire.stats import Stats
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
from tests.support.fake_engine import VOCABULARY, FakeEngine

Answer = TypeVar("Answer")

SECONDS = 20.0


class Deployment:
    """What the coordinator told the api: `tokens`, `details`, `cached`, `timings`, `ended` (in order of arrival),
    `statuses`; the supervisor, of experts on other hosts: `notes`. `expert`: further configuration of some of them. Who
    runs an expert with an `address` is the test. `unanswered`: expert -> the number of the question for whole rows
    that its worker dies of."""

    def __init__(
        self,
        directory: Path,
        engines: list[FakeEngine],
        *,
        projector: Projector | None = None,
        expert: dict[int, dict[str, Any]] | None = None,
        unanswered: dict[int, int] | None = None,
        **settings: Any,
    ) -> None:
        names = [chr(ord("a") + index) for index in range(len(engines))]
        limits = {"sequences": 8, "queue": 100, "tick_seconds": SECONDS} | settings.pop("limits", {})
        data = {
            "name": "fake",
            "experts": [
                {"name": name, "model": name, **(expert or {}).get(index, {})} for index, name in enumerate(names)
            ],
            "list_length": VOCABULARY,
            "limits": limits,
            **settings,
        }
        self.config: Config = parse_config(data, directory=directory)
        self.engines = engines
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.details: dict[int, list[TokenDetails]] = defaultdict(list)
        self.cached: dict[int, int] = {}
        self.timings: dict[int, SequenceTiming] = {}
        self.ended: dict[int, Ended] = {}
        self.statuses: list[Status] = []
        self.records: list[Recorded] = []
        self._answers: list[ToApi] = []
        self.restarts: list[RestartExpert] = []
        self.notes: list[str] = []
        self.drained = False
        self._terminal: Counter[int] = Counter()
        self._submitted: set[int] = set()
        self._aborted: set[int] = set()
        self._stats: list[Stats] = []
        self._directory = directory
        self._projector = projector
        self._unanswered = unanswered or {}
        self._generation = [-1] * len(engines)
        self._workers: list[_WorkerThread | None] = [None] * len(engines)
        self._ready = False

    def __enter__(self) -> Self:
        torch.set_num_threads(1)
        warm_up()  # may compile, which no time limit here is meant for
        self._coordinator = _CoordinatorThread(self.config, self._directory)
        self._coordinator.start()
        self._api: Channel[ToApi, FromApi] = Channel(endpoint(self._directory, "api"), ToApi, bind=False)
        self._control: Channel[ToSupervisor, FromSupervisor] = Channel(
            endpoint(self._directory, "control"), ToSupervisor, bind=False
        )
        for index, expert in enumerate(self.config.experts):
            if expert.address is None:
                self.start(index)
        try:
            self.until(lambda: self._ready)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            stopped = self._close()
        assert stopped or kind is not None, "the coordinator did not stop"

    def check(self) -> None:
        """Exactly one terminal message for every sequence; an aborted one may have none."""
        self.stats()
        assert set(self._terminal) <= self._submitted
        assert set(self.tokens) <= self._submitted
        for sequence in self._submitted:
            assert self._terminal[sequence] == 1 or (sequence in self._aborted and not self._terminal[sequence])

    # --- as the api ---

    def submit(self, *requests: SequenceRequest) -> None:
        self._submitted |= {request.id for request in requests}
        self._api.send(Submit(list(requests)))

    def abort(self, *sequences: int) -> None:
        self._aborted |= set(sequences)
        self._api.send(Abort(list(sequences)))

    def finish(self, *requests: SequenceRequest) -> None:
        """Wait until all of `requests` have ended."""
        self.until(lambda: all(request.id in self.ended for request in requests))

    def run(self, *requests: SequenceRequest) -> None:
        self.submit(*requests)
        self.finish(*requests)

    def stats(self) -> Stats:
        self._stats.clear()
        self._api.send(GetStats())
        self.until(lambda: bool(self._stats))
        return self._stats[0]

    def ask(self, question: FromApi, kind: type[Answer]) -> Answer:
        """The answer, of one kind, to a question."""
        self._answers.clear()
        self._api.send(question)
        self.until(lambda: any(isinstance(answer, kind) for answer in self._answers))
        return next(answer for answer in self._answers if isinstance(answer, kind))

    def until_stats(self, condition: Callable[[Stats], bool]) -> Stats:
        """The first snapshot that satisfies `condition`."""
        self.until(lambda: condition(self.stats()))
        return self._stats[0]

    def receive(self, timeout: float) -> ToApi | None:
        """The next message within `timeout` seconds, which is noted as all are."""
        if (message := self._api.receive(timeout)) is not None:
            self._note(message)
        return message

    # --- as the supervisor ---

    def start(self, expert: int, engine: FakeEngine | None = None) -> None:
        """Start a worker process for `expert`, over `engine` if given."""
        self.engines[expert] = engine or self.engines[expert]
        self._generation[expert] += 1
        self._control.send(ExpertUp(expert, self._generation[expert]))
        address = endpoint(self._directory, expert_socket(expert, self._generation[expert]))
        unanswered = self._unanswered.pop(expert, None)
        worker = _WorkerThread(self.engines[expert], address, expert, self.config, self._projector, unanswered)
        worker.start()
        self._workers[expert] = worker

    def lose(self, expert: int) -> None:
        """Wait for the worker of `expert` to end by itself, and say so."""
        worker = self._workers[expert]
        assert worker is not None
        self.until(lambda: not worker.is_alive())
        self._workers[expert] = None
        self._control.send(ExpertDown(expert, self._generation[expert], str(worker.error)))

    def kill(self, expert: int) -> None:
        self.engines[expert].killed.set()
        self.lose(expert)

    def tell(self, message: FromSupervisor) -> None:
        self._control.send(message)

    def drain(self, grace_seconds: float) -> None:
        self._control.send(Drain(grace_seconds))

    # --- messages ---

    def until(self, condition: Callable[[], bool]) -> None:
        """Take messages until `condition` holds."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            for thread in (self._coordinator, *self._workers):
                if thread is not None and not isinstance(thread.error, EngineError | KilledError | None):
                    raise thread.error
            assert time.monotonic() < deadline, "the coordinator did not come to it"
            if (message := self._api.receive(0.01)) is not None:
                self._note(message)
            for order in self._control.drain():
                self._note_order(order)

    def _note(self, message: ToApi) -> None:
        match message:
            case Progress(sequences=sequences, tokens=tokens, details=details, cached_tokens=cached, timings=timings):
                assert not self.cached.keys() & cached.keys()
                self.cached |= cached
                self.timings |= timings
                for sequence, token in zip(sequences, tokens, strict=True):
                    assert sequence not in self._terminal, "a token after the end"
                    self.tokens[sequence].append(token)
                    if sequence in details:
                        self.details[sequence].append(details[sequence])
            case Ended(sequence=sequence):
                self._terminal[sequence] += 1
                self.ended[sequence] = message
            case Status():
                self.statuses.append(message)
            case Stats():
                self._stats.append(message)
            case Recorded():
                self.records.append(message)
            case _:
                self._answers.append(message)

    def _note_order(self, order: ToSupervisor) -> None:
        match order:
            case CoordinatorReady():
                self._ready = True
            case RestartExpert():
                self.restarts.append(order)
            case RemoteNote(message=message):
                self.notes.append(message)
            case Drained():
                self.drained = True

    def _close(self) -> bool:
        """End all threads; whether the coordinator ended when it was told to."""
        self._control.send(Stop())
        self._coordinator.join(5.0)
        for engine, worker in zip(self.engines, self._workers, strict=True):
            engine.behaviour.hold.set()
            if worker is not None:
                worker.join(0.5)
                engine.killed.set()
                worker.join(SECONDS)
        self._api.close()
        self._control.close()
        return not self._coordinator.is_alive()


class _CoordinatorThread(threading.Thread):
    def __init__(self, config: Config, directory: Path) -> None:
        super().__init__(daemon=True)
        self._config, self._directory = config, directory
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            CoordinatorProcess(self._config, self._directory).run()
        except BaseException as error:
            self.error = error


class _WorkerThread(threading.Thread):
    """A worker that can be killed between two messages and in the middle of a fake engine's step, and dies of
    question number `unanswered` for whole rows."""

    def __init__(
        self,
        engine: FakeEngine,
        address: str,
        expert: int,
        config: Config,
        projector: Projector | None,
        unanswered: int | None,
    ) -> None:
        super().__init__(daemon=True)
        self._unanswered = unanswered
        self._engine, self._address, self._expert = engine, address, expert
        self._config, self._projector = config, projector
        self.error: Exception | None = None

    def run(self) -> None:
        channel = _KillableChannel(self._address, self._engine.killed, self._unanswered)
        worker = Worker(
            self._engine,
            channel,
            expert=self._expert,
            top_k=list_length(self._config),
            projector=self._projector,
        )
        try:
            worker.run()
        except Exception as error:
            self.error = error
        finally:
            channel.close()


class KilledError(Exception):
    """The worker was killed while it waited for a message, or before it answered one."""


class _KillableChannel(Channel[ToExpert, FromExpert]):
    def __init__(self, address: str, killed: threading.Event, unanswered: int | None) -> None:
        super().__init__(address, ToExpert, bind=False)
        self._killed = killed
        self._unanswered = unanswered

    def receive(self, timeout: float | None) -> ToExpert | None:
        while (message := super().receive(0.02)) is None:
            if self._killed.is_set():
                raise KilledError
        if self._unanswered is not None and isinstance(message, GetRows):
            self._unanswered -= 1
            if not self._unanswered:
                raise KilledError
        return message
