"""Experts without models: logits that are a pure function of the tokens read, and an engine that schedules, preempts
and caches like a real one, and fails on demand."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from server.errors import EngineError
from server.expert.engine import Exchange, Rows
from server.wire.expert import Add, Load, Ready

VOCABULARY = 48
HIDDEN = 6
WAIT_SECONDS = 30.0
NO_GRAMMAR = "?"


@dataclass(frozen=True)
class FakeModel:
    """Expert number `expert`. What it says depends on every token it has read, in order, and on nothing else."""

    expert: int
    vocabulary: int = VOCABULARY

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32[V] of the token that follows `tokens`."""
        return (2.5 * self._generator(tokens, "logits").normal(size=self.vocabulary)).astype(np.float32)

    def hidden(self, tokens: Sequence[int]) -> np.ndarray:
        """float32[H]: a last hidden state."""
        return self._generator(tokens, "hidden").normal(size=HIDDEN).astype(np.float32)

    def _generator(self, tokens: Sequence[int], purpose: str) -> np.random.Generator:
        text = f"{purpose} {self.expert} {list(tokens)}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


@dataclass
class Behaviour:
    """How an engine behaves; a test may change it while the engine runs.

    `chunk`: prompt tokens that one step reads at most. `cache`: whether dropped sequences' KV is found again.
    `nan`, `empty`: tokens read -> the row is all NaN, all -inf. `misplace`: numbers of steps whose rows claim the next
    position. `fail_at`, `hang_at`: numbers of steps, from 1. `hold`: while it is clear, steps wait. `pause`: seconds
    that a step takes.
    """

    chunk: int = 1_000_000
    kv_tokens: int = 4096
    block_size: int = 16
    max_model_len: int = 2048
    cache: bool = True
    nan: Callable[[list[int]], bool] = lambda tokens: False
    empty: Callable[[list[int]], bool] = lambda tokens: False
    misplace: tuple[int, ...] = ()
    fail_at: int | None = None
    hang_at: int | None = None
    pause: float = 0.0
    hold: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.hold.set()


@dataclass
class _Sequence:
    add: Add
    tokens: list[int]
    computed: int
    blocks: int = 0
    preemptions: int = 0
    prefilled: bool = False


class FakeEngine:
    """`server.expert.engine.Engine` over a `FakeModel`.

    Oldest first; where blocks run out, the youngest is preempted and reads everything again. Rows come in an order of
    their own. A grammar is "5 6|7": the ids allowed at each generated position, in turn. `peak`: the most sequences
    that were in it at once.
    """

    def __init__(self, model: FakeModel, behaviour: Behaviour | None = None, *, want_hidden: bool = False) -> None:
        self.model = model
        self.behaviour = behaviour or Behaviour()
        self.info = Ready(
            self.behaviour.kv_tokens,
            self.behaviour.block_size,
            self.behaviour.max_model_len,
            model.vocabulary,
            HIDDEN,
            "fake",
        )
        self.sequences: dict[int, _Sequence] = {}
        self.steps = 0
        self.peak = 0
        self.preemptions = 0
        self.killed = threading.Event()
        self.closed = False
        self._want_hidden = want_hidden
        self._kept: dict[int, list[int]] = {}
        self._cached: dict[int, int] = {}
        self._scores: list[tuple[int, np.ndarray]] = []
        self._refused: list[tuple[int, str]] = []
        self._order = np.random.default_rng(model.expert)

    def add(self, add: Add) -> None:
        if add.slot in self.sequences:
            raise EngineError(f"slot {add.slot} is taken")
        found = 0
        if self.behaviour.cache and not add.score:
            for mine, kept in zip(add.tokens, self._kept.get(add.sequence, []), strict=False):
                if mine != kept:
                    raise EngineError("a sequence came back with other tokens")
                found += 1
            found = min(found, len(add.tokens) - 1) // self.behaviour.block_size * self.behaviour.block_size
        self.sequences[add.slot] = _Sequence(add, list(add.tokens), found)
        if add.grammar == NO_GRAMMAR:
            self._refused.append((add.sequence, "no grammar"))
        self._cached[add.sequence] = found
        self.peak = max(self.peak, len(self.sequences))

    def drop(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if (sequence := self.sequences.pop(slot, None)) is not None:
                self._kept[sequence.add.sequence] = sequence.tokens[: sequence.computed]

    def remember(self, sequence: int, tokens: list[int]) -> None:
        """Have the KV of a sequence's first `tokens` in the cache."""
        self._kept[sequence] = tokens

    def busy(self) -> bool:
        return bool(self.sequences)

    def step(self, exchange: Exchange) -> None:
        self.steps += 1
        self._misbehave()
        due = [sequence for sequence in self._schedule() if sequence.computed == len(sequence.tokens)]
        due = [due[index] for index in self._order.permutation(len(due))]
        for sequence in due:
            if not sequence.prefilled:
                sequence.prefilled = True
                if sequence.add.score:
                    self._scores.append((sequence.add.sequence, self._score(sequence.add.tokens)))
        chosen = exchange(self._rows(due))
        if len(chosen) != len(due):
            raise EngineError(f"{len(chosen)} tokens for {len(due)} rows")
        for sequence, token in zip(due, chosen.tolist(), strict=True):
            if not 0 <= token < self.model.vocabulary:
                raise EngineError(f"{token} is no token")
            sequence.tokens.append(token)

    def load(self) -> Load:
        used = sum(sequence.blocks for sequence in self.sequences.values())
        running = sum(sequence.blocks > 0 for sequence in self.sequences.values())
        return Load(used * self.behaviour.block_size / self.behaviour.kv_tokens, running, self.preemptions)

    def scores(self) -> list[tuple[int, np.ndarray]]:
        scores, self._scores = self._scores, []
        return scores

    def refused(self) -> list[tuple[int, str]]:
        refused, self._refused = self._refused, []
        return refused

    def cached_tokens(self) -> dict[int, int]:
        cached, self._cached = self._cached, {}
        return cached

    def bare_steps(self, sequences: int, prompt_tokens: int, tokens: int) -> list[float]:
        return [0.001 * sequences] * tokens

    def close(self) -> None:
        self.closed = True

    def _misbehave(self) -> None:
        self._wait(lambda: self.behaviour.hold.wait(0.01))
        if self.behaviour.pause:
            self.killed.wait(self.behaviour.pause)
        if self.steps == self.behaviour.fail_at:
            raise EngineError("out of memory")
        if self.steps == self.behaviour.hang_at:
            self._wait(lambda: self.killed.wait(0.01))

    def _wait(self, over: Callable[[], bool]) -> None:
        waited = 0.0
        while not over():
            waited += 0.01
            if self.killed.is_set() or waited > WAIT_SECONDS:
                raise EngineError("killed")

    def _schedule(self) -> list[_Sequence]:
        """What this step computes: every sequence that has blocks for all its tokens, as far as `chunk` reaches."""
        budget, scheduled = self.behaviour.chunk, []
        for sequence in sorted(self.sequences.values(), key=lambda each: each.add.priority):
            if sequence.add.grammar != NO_GRAMMAR and self._allocate(sequence) and budget:
                read = min(len(sequence.tokens) - sequence.computed, budget)
                budget -= read
                sequence.computed += read
                scheduled.append(sequence)
        return scheduled

    def _allocate(self, sequence: _Sequence) -> bool:
        wanted = -(-len(sequence.tokens) // self.behaviour.block_size)
        while wanted > sequence.blocks + self._free():
            younger = [
                each for each in self.sequences.values() if each.blocks and each.add.priority > sequence.add.priority
            ]
            if not younger:
                return False
            victim = max(younger, key=lambda each: each.add.priority)
            victim.blocks = victim.computed = 0
            self.preemptions += 1
        sequence.blocks = wanted
        return True

    def _free(self) -> int:
        return self.behaviour.kv_tokens // self.behaviour.block_size - sum(s.blocks for s in self.sequences.values())

    def _rows(self, due: list[_Sequence]) -> Rows:
        shift = int(self.steps in self.behaviour.misplace)
        logits = np.array([self._masked(each) for each in due], np.float32).reshape(-1, self.model.vocabulary)
        hidden = None
        if self._want_hidden:
            hidden = torch.from_numpy(np.array([self.model.hidden(each.tokens) for each in due]).reshape(-1, HIDDEN))
        return Rows(
            np.array([each.add.slot for each in due], np.int32),
            np.array([len(each.tokens) + shift for each in due], np.int32),
            torch.from_numpy(logits),
            hidden,
        )

    def _masked(self, sequence: _Sequence) -> np.ndarray:
        """The row after the grammar's mask: a grammar is the ids that it allows, by position in the generated text."""
        row, add = self._row(sequence.tokens), sequence.add
        if add.grammar is None:
            return row
        place = len(sequence.tokens) - len(add.tokens) + add.generated
        choices = add.grammar.split("|")
        allowed = [int(token) for token in choices[place % len(choices)].split()]
        masked = np.full_like(row, -np.inf)
        masked[allowed] = row[allowed]
        return masked

    def _row(self, tokens: list[int]) -> np.ndarray:
        if self.behaviour.nan(tokens):
            return np.full(self.model.vocabulary, np.nan, np.float32)
        if self.behaviour.empty(tokens):
            return np.full(self.model.vocabulary, -np.inf, np.float32)
        return self.model.logits(tokens)

    def _score(self, tokens: list[int]) -> np.ndarray:
        rows = torch.tensor(np.array([self.model.logits(tokens[:at]) for at in range(1, len(tokens))]))
        if not len(rows):
            return np.zeros(0, np.float32)
        return rows.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
