"""The coordinator's side of the sockets to the experts: one link each, and the barrier over all of them.

Knows which worker process is meant (`generation`), whether it is up, and whether it owes a report. Decides nothing
about sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TypeVar

import numpy as np

from server.coordinator.arrays import Float32, Int32
from server.placement import expert_socket
from server.remote.dialer import Dialer
from server.wire.base import Stop
from server.wire.channel import Channel, ConnectedChannel, Selector, endpoint
from server.wire.expert import Add, Bare, BareDone, FromExpert, GetRows, Load, Ready, Report, Tick, ToExpert, WholeRows
from server.wire.shared_rows import RowMemory

Answer = TypeVar("Answer", WholeRows, BareDone)


_LOOK_SECONDS = 0.2


class LinkState(Enum):
    STARTING = "starting"
    UP = "up"
    DOWN = "down"


class ExpertLink:
    """One expert: its socket, its state, its last report, and what it is told next."""

    def __init__(self, index: int, name: str, dialer: Dialer | None = None) -> None:
        self.index = index
        self.name = name
        self.dialer = dialer
        """How it is reached on another host."""
        self.state = LinkState.DOWN
        self.generation = -1
        """Which worker process is meant."""
        self.restarts = -1
        self.info: Ready | None = None
        self.load: Load | None = None
        self.owes_report = False
        self.silent = False
        """It did not answer a question, so that it is to be given up once the tick is over."""
        self.report: Report | None = None
        self.drop: list[int] = []
        """Slots that leave the engine with the next `Tick`."""
        self.park: list[int] = []
        """Slots that leave it for a while."""
        self.ticked_at = 0.0
        self.arrived_at = 0.0
        self.channel: Channel[FromExpert, ToExpert] | None = None
        self._memory: RowMemory | None = None

    def open(self, directory: Path, generation: int) -> Channel[FromExpert, ToExpert]:
        """Listen for worker process number `generation`."""
        self.generation = generation
        return self._begin(Channel(endpoint(directory, expert_socket(self.index, generation)), FromExpert, bind=True))

    def reach(self) -> Channel[FromExpert, ToExpert] | None:
        """The connection to a worker on another host, once there is a new one. Raises UnreachableError."""
        if self.dialer is None or self.channel is not None or (peer := self.dialer.reach()) is None:
            return None
        return self._begin(ConnectedChannel(peer, FromExpert))

    def _begin(self, channel: Channel[FromExpert, ToExpert]) -> Channel[FromExpert, ToExpert]:
        self.restarts += 1
        self.state = LinkState.STARTING
        self.ticked_at = time.perf_counter()
        self.channel = channel
        return channel

    def close(self) -> None:
        """Forget the worker; what it still sends goes nowhere."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self.state = LinkState.DOWN
        self.owes_report = self.silent = False
        self.report = None
        self.load = None  # its cache is gone, and the next worker's is empty
        self.drop, self.park = [], []

    @property
    def lost(self) -> bool:
        """Whether the connection to another host has ended; of a local worker, the supervisor will say so."""
        return isinstance(self.channel, ConnectedChannel) and self.channel.ended

    @property
    def up(self) -> bool:
        return self.state is LinkState.UP and not self.silent

    def tick(self, number: int, tokens: Int32, add: list[Add], *, steps: bool) -> None:
        """Send the next `Tick`. `steps`: the engine has sequences after it, so a report will come."""
        self.send(Tick(number, tokens.tobytes(), self.drop, self.park, add))
        self.drop, self.park = [], []
        self.report = None
        self.owes_report = steps
        self.ticked_at = time.perf_counter()

    def row_memory(self, slots: int) -> RowMemory | None:
        """Where an expert on this host writes whole rows, of at most `slots` sequences."""
        if self._memory is None and self.dialer is None and self.info is not None:
            self._memory = RowMemory(slots, self.info.vocab_size)
        return self._memory

    def release(self) -> None:
        """Give up what outlives its workers."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self.dialer is not None:
            self.dialer.close()

    def send(self, message: ToExpert) -> None:
        if self.channel is not None:
            self.channel.send(message)

    def note(self, message: FromExpert) -> None:
        """Keep what a message says of the engine."""
        if isinstance(message, Report):
            self.report, self.owes_report = message, False
            self.load = message.load
            self.arrived_at = time.perf_counter()
        elif isinstance(message, Load):
            self.load = message
        elif isinstance(message, Ready):
            self.info, self.state = message, LinkState.UP


class ExpertLinks:
    """All links.

    `on_message` sees every message after its link has, `on_lost` every link whose connection to another host has ended.
    At most `sequences` run at once.
    """

    def __init__(
        self,
        names: list[str],
        selector: Selector,
        on_message: Callable[[ExpertLink, FromExpert], None],
        on_lost: Callable[[ExpertLink], None],
        dialers: dict[int, Dialer],
        sequences: int,
    ) -> None:
        self.links = [ExpertLink(index, name, dialers.get(index)) for index, name in enumerate(names)]
        self.remote = [link for link in self.links if link.dialer is not None]
        self._selector = selector
        self._questions = 0
        self._sequences = sequences
        self._on_message = on_message
        self._on_lost = on_lost

    def open(self, expert: int, directory: Path, generation: int) -> None:
        """Listen for a worker process that was started."""
        self.close(expert)
        link = self.links[expert]
        self._selector.register(link.open(directory, generation), lambda message: self._receive(link, message))

    def reach(self, link: ExpertLink) -> bool:
        """Whether there is a new connection to a worker on another host. Raises UnreachableError for each attempt that
        failed."""
        if (channel := link.reach()) is None:
            return False
        self._selector.register(channel, lambda message: self._receive(link, message))
        return True

    def dispatch(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for messages of any kind, and handle those that came."""
        self._selector.dispatch(timeout)
        for link in self.remote:
            if link.lost:
                self._on_lost(link)

    def close(self, expert: int) -> None:
        """Forget a worker process."""
        link = self.links[expert]
        if link.channel is not None:
            self._selector.unregister(link.channel)
        link.close()

    def stepping(self) -> bool:
        """Whether any engine owes a report."""
        return any(link.owes_report for link in self.links)

    def collect(self, time_limit: float) -> list[ExpertLink]:
        """The barrier: return once every stepping engine has reported; those that did not within `time_limit` seconds.

        Messages from everyone else are handled meanwhile.
        """
        deadline = time.perf_counter() + time_limit
        while self.stepping():
            if (left := deadline - time.perf_counter()) <= 0:
                return [link for link in self.links if link.owes_report]
            self.dispatch(left)
        return []

    def whole_rows(self, wanted: dict[int, Int32], time_limit: float) -> dict[int, Float32]:
        """expert -> slots int32[B] in, expert -> log-probabilities float32[B, V] out, all in one round. They may be
        overwritten by the next one.

        All engines are at their rendezvous or idle, so each answers at once. Experts that have not within `time_limit`
        seconds, or answer something else, are left out, and silent from now on.
        """
        deadline = time.perf_counter() + time_limit
        self._questions += 1
        wanted = {expert: slots for expert, slots in wanted.items() if self.links[expert].up}
        for expert, slots in wanted.items():
            memory = self.links[expert].row_memory(self._sequences)
            path = "" if memory is None else memory.path
            self.links[expert].send(GetRows(self._questions, slots.tobytes(), path))
        found = {}
        for expert, slots in wanted.items():
            answer = self._await(expert, WholeRows, deadline - time.perf_counter())
            while answer is not None and answer.number != self._questions:
                answer = self._await(expert, WholeRows, deadline - time.perf_counter())
            rows = None if answer is None else self._rows_of(expert, answer, len(slots))
            if rows is None:
                self.links[expert].silent = True
            else:
                found[expert] = rows
        return found

    def _rows_of(self, expert: int, answer: WholeRows, rows: int) -> Float32 | None:
        """float32[rows, V] of an answer, None if it does not hold them."""
        link = self.links[expert]
        if answer.logprobs is None:
            memory = link.row_memory(self._sequences)
            return None if memory is None else memory.rows[:rows]
        vocabulary = 0 if link.info is None else link.info.vocab_size
        if len(answer.logprobs) != 4 * rows * vocabulary:
            return None
        return np.frombuffer(answer.logprobs, np.float32).reshape(rows, vocabulary)

    def bare(self, experts: list[int], request: Bare, time_limit: float) -> dict[int, list[float]]:
        """Run `request` in several engines at the same time: expert -> seconds of each step."""
        for expert in experts:
            self.links[expert].send(request)
        answers = {expert: self._await(expert, BareDone, time_limit) for expert in experts}
        return {expert: answer.step_seconds for expert, answer in answers.items() if answer is not None}

    def stop(self) -> None:
        for link in self.links:
            link.send(Stop())
            self.close(link.index)
            link.release()

    def _receive(self, link: ExpertLink, message: FromExpert) -> None:
        link.note(message)
        self._on_message(link, message)

    def _await(self, expert: int, kind: type[Answer], time_limit: float) -> Answer | None:
        """An expert's next message of one kind, None after `time_limit` seconds."""
        link = self.links[expert]
        deadline = time.perf_counter() + time_limit
        while link.channel is not None and (left := deadline - time.perf_counter()) > 0:
            message = link.channel.receive(min(left, _LOOK_SECONDS))
            if message is None and not link.channel.connected:
                return None  # its process has ended; the supervisor will say so
            if isinstance(message, kind):
                return message
            if message is not None:
                self._receive(link, message)
        return None
