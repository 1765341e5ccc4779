"""The worker: hosts one engine, runs one step for each tick, and exchanges rows for tokens in the middle of it.

A tick, seen from here: `Tick` brings the tokens for the rows last reported, then what to drop and to add; the engine
steps; in the middle of the step its rows go out as a `Report`, and the next `Tick` is awaited before the step ends.
So there is one exchange a step, and an engine with nothing in it waits for a `Tick` outside a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from server.expert.engine import Engine, Int32, Rows
from server.expert.logprobs import Statistics, statistics
from server.expert.ranks import CoordinatorLink
from server.wire.base import Stop
from server.wire.expert import Add, Bare, BareDone, GetRows, Refused, Report, Scored, Tick, WholeRows
from server.wire.shared_rows import RowWriter

_NO_SLOTS = np.zeros(0, np.int32)


class Projector(Protocol):
    """The gate's part that runs here: `project(expert, hidden[B, H]) -> [B, d]`."""

    def project(self, expert: int, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Asked:
    """What rows asked for."""

    temperatures: torch.Tensor | None
    """[B, 1]; None when all are 1."""
    exact_ids: torch.Tensor | None
    """int64[B, X], -1 for none; None without any."""
    entropy: bool
    """Whether any of them is to carry its entropy."""


class Worker:
    """Drives `engine` for the expert with index `expert`, until a `Stop` arrives; leaves it empty.

    `shares_memory`: the coordinator is on this host, and may name memory for whole rows.
    """

    def __init__(
        self,
        engine: Engine,
        channel: CoordinatorLink,
        *,
        expert: int,
        top_k: int,
        projector: Projector | None,
        shares_memory: bool = True,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._expert = expert
        self._top_k = top_k
        self._projector = projector
        self._writer = RowWriter() if shares_memory else None
        self._retained: dict[int, Statistics] = {}
        """slot -> the last row of a parked sequence, which may still be asked for whole."""
        self._shown: tuple[Int32, Statistics] | None = None
        self._asked_of: tuple[bytes, _Asked] | None = None
        self._number = 0
        self._sequences: dict[int, Add] = {}
        self._tick: Tick | None = None
        self._step_started = 0.0
        self._stopped = False

    def run(self) -> None:
        """Serve until `Stop`. Raises whatever the engine raises."""
        self._channel.send(self._engine.info)
        while not self._stopped:
            if self._tick is None:
                self._await_tick()
            self._apply_tick()
            while self._engine.busy() and not self._stopped:
                self._step_started = time.perf_counter()
                self._engine.step(self._exchange)
                self._send_notes()
                self._apply_tick()
                if not self._engine.busy():
                    self._channel.send(self._engine.load())
        self._engine.drop(list(self._sequences))

    def _await_tick(self) -> None:
        """Outside a step: wait for the next `Tick`, or do what else is asked."""
        match self._channel.receive(None):
            case Tick() as tick:
                self._tick = tick
            case GetRows() as question:
                self._answer(question)
            case Bare(sequences=sequences, prompt_tokens=prompt_tokens, tokens=tokens):
                self._channel.send(BareDone(self._engine.bare_steps(sequences, prompt_tokens, tokens)))
            case Stop():
                self._stopped = True

    def _apply_tick(self) -> None:
        if (tick := self._tick) is None:
            return
        self._tick, self._number = None, tick.number
        if tick.add:
            self._asked_of = None
        if gone := tick.drop + tick.park:
            self._engine.drop(gone)
        for slot in gone:
            self._sequences.pop(slot, None)
        for slot in tick.drop:
            self._retained.pop(slot, None)
        for add in tick.add:
            self._retained.pop(add.slot, None)
            self._engine.add(add)
            self._sequences[add.slot] = add

    def _keep_logits(self, parked: list[int]) -> None:
        if self._shown is None:
            return
        (slots, figures), self._shown = self._shown, None
        if parked:
            row_of = {slot: row for row, slot in enumerate(slots.tolist())}
            self._retained |= {slot: figures.row(row_of[slot]) for slot in parked if slot in row_of}

    def _exchange(self, rows: Rows) -> Int32:
        """Report `rows`, answer questions about them, return their tokens int32[B]."""
        asked = self._asked(rows)
        figures = statistics(rows.logits, asked.temperatures)
        self._shown = (rows.slots, figures)
        self._channel.send(self._report(rows, figures, asked))
        while True:
            match self._channel.receive(None):
                case GetRows() as question:
                    self._answer(question)
                case Tick() as tick:
                    self._tick = tick
                    self._keep_logits(tick.park)  # now: the engine will overwrite them
                    return np.frombuffer(tick.tokens, np.int32)
                case Stop():
                    self._stopped = True
                    return np.zeros(len(rows.slots), np.int32)

    def _answer(self, question: GetRows) -> None:
        """Whole rows of those shown in this step and those kept of parked sequences."""
        slots = np.frombuffer(question.slots, np.int32).tolist()
        vocabulary = self._engine.info.vocab_size
        writer = self._writer if question.memory else None
        memory = None if writer is None else writer.open(question.memory, vocabulary)
        rows = np.empty((len(slots), vocabulary), np.float32) if memory is None else memory
        shown, figures = self._shown if self._shown is not None else (_NO_SLOTS, None)
        row_of = {slot: row for row, slot in enumerate(shown.tolist())}
        for index, slot in enumerate(slots):
            target = torch.from_numpy(rows[index])
            if figures is not None and slot in row_of:
                figures.write(row_of[slot], target)
            elif slot in self._retained:
                self._retained[slot].write(0, target)
            else:
                target.fill_(-torch.inf)
        self._channel.send(WholeRows(question.number, rows.tobytes() if memory is None else None))

    def _report(self, rows: Rows, figures: Statistics, asked: _Asked) -> Report:
        ids, logprobs = figures.top_k(self._top_k)
        return Report(
            number=self._number,
            slots=rows.slots.tobytes(),
            positions=rows.positions.tobytes(),
            ids=_int32_bytes(ids),
            logprobs=_float32_bytes(logprobs),
            exact=b"" if asked.exact_ids is None else _float32_bytes(figures.gather(asked.exact_ids)),
            entropies=_float32_bytes(figures.entropies()) if asked.entropy else b"",
            projected=self._project(rows.hidden),
            step_seconds=time.perf_counter() - self._step_started,
            load=self._engine.load(),
            cached_tokens=self._engine.cached_tokens(),
        )

    def _asked(self, rows: Rows) -> _Asked:
        """What the rows' sequences asked for; kept while the same sequences are in the same rows, and none has tokens
        given to it."""
        key = rows.slots.tobytes()
        if self._asked_of is not None and self._asked_of[0] == key:
            return self._asked_of[1]
        adds = [self._sequences[slot] for slot in rows.slots.tolist()]
        exact_ids = [_exact_ids(add, position) for add, position in zip(adds, rows.positions.tolist(), strict=True)]
        entropy = any(add.entropy for add in adds)
        asked = _ask([add.temperature for add in adds], exact_ids, entropy, rows.logits.device)
        self._asked_of = None if any(add.given for add in adds) else (key, asked)
        return asked

    def _project(self, hidden: torch.Tensor | None) -> bytes:
        if self._projector is None or hidden is None or not len(hidden):
            return b""
        return _float32_bytes(self._projector.project(self._expert, hidden.float()))

    def _send_notes(self) -> None:
        for sequence, logprobs in self._engine.scores():
            self._channel.send(Scored(sequence, logprobs.astype(np.float32).tobytes()))
        for sequence, message in self._engine.refused():
            self._channel.send(Refused(sequence, message))


def _exact_ids(add: Add, position: int) -> list[int]:
    """The ids that a row of this sequence carries: at each position another one of the given tokens."""
    place = position - len(add.tokens)
    return add.exact_ids + add.given[place : place + 1]


def _ask(temperatures: list[float], exact_ids: list[list[int]], entropy: bool, device: torch.device) -> _Asked:
    width = max(map(len, exact_ids), default=0)
    padded = [ids + [-1] * (width - len(ids)) for ids in exact_ids]
    return _Asked(
        torch.tensor(temperatures, device=device)[:, None] if any(value != 1.0 for value in temperatures) else None,
        torch.tensor(padded, device=device) if width else None,
        entropy,
    )


def _int32_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.to(torch.int32).cpu().numpy().tobytes()


def _float32_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.float().cpu().numpy().tobytes()
