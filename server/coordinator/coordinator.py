"""The tick loop. `Coordinator.tick` is the algorithm of the whole project: every engine runs one step, the sequences
that all their experts reported are fused and sampled, and the tokens go back into every engine's KV cache.

Alignment is one rule. A sequence reported by all its experts in this tick is fused. A sequence reported by only some is
parked: the rows are kept, it leaves the engines that reported it (their KV stays in the prefix cache), and it is added
again, with its tokens so far, once its token is chosen. Different prompt lengths, chunked prefill, a preemption in one
engine, an expert's restart: all are this case, and no tick ever waits for a row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from server.config import Config
from server.coordinator.admission import WaitingQueue, fits
from server.coordinator.experts import ExpertLink
from server.coordinator.fuser import Fused, Fuser
from server.coordinator.fusion import Float32, Int32, Int64
from server.coordinator.sampling import choose, penalise, uniforms
from server.coordinator.stats import Counters
from server.coordinator.table import SequenceTable
from server.messages import Add, Choice, Ended, Progress, Report, Scored, ToApi
from server.policy import Perplexity, participants
from server.request import FinishReason, SequenceRequest


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a tick chose: for `fused` rows, the candidate `columns` int64[B] and their `tokens` int32[B].

    `sequences` int64[B] says whose they are, `detailed` (row, alternatives wanted) who asked for more than the token:
    both outlive the slots, which a sequence that ends gives up before its token is sent.
    """

    fused: Fused
    columns: Int64
    tokens: Int32
    sequences: Int64
    detailed: list[tuple[int, int]]


class Coordinator:
    """Owns the sequences. Talks to experts through `links`; what it has to say to the api collects in `outbox`."""

    def __init__(
        self, config: Config, links: list[ExpertLink], fuser: Fuser, table: SequenceTable, counters: Counters
    ) -> None:
        self._config = config
        self._links = links
        self._fuser = fuser
        self._table = table
        self._counters = counters
        self._waiting = WaitingQueue()
        self._names = config.expert_names
        self._drop: list[list[int]] = [[] for _ in links]
        self._park: list[list[int]] = [[] for _ in links]
        self._token_of = np.zeros(len(table.active), np.int32)
        self._step_started = time.perf_counter()
        self.outbox: list[ToApi] = []
        self.draining = False

    # --- the tick -------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One tick, from the engines' reports to the start of their next step. Every stepping engine has reported."""
        phase = self._counters.phase
        with phase("align"):
            slots = self._align()
        drawn = self._draw(slots) if slots.size else None
        with phase("step"):
            if drawn is not None:
                self._advance(drawn)
            ended = self._end_finished(drawn)
            self._admit()
            self._count_tick(drawn)
            self._step_engines()
        with phase("emit"):
            self._emit(drawn, ended)

    def _align(self) -> Int64:
        """Keep the rows just reported; the slots that are complete, oldest first. Park the others that reported."""
        table = self._table
        fresh = [self._take_rows(link, link.report) if link.report is not None else None for link in self._links]
        self._count_barrier()
        complete = table.complete()
        for link, slots in zip(self._links, fresh, strict=True):
            if slots is not None and (parked := slots[~np.isin(slots, complete)]).size:
                table.placed[parked, link.index] = False
                self._park[link.index] += parked.tolist()
                self._counters.parked += len(parked)
        return complete

    def _take_rows(self, link: ExpertLink, report: Report) -> Int64:
        """Keep a report's rows in the table; the slots they are for. Rows of sequences that ended meanwhile, or at an
        unexpected position, are left out; the latter leave the engine, to be added again."""
        table, expert = self._table, link.index
        slots = np.frombuffer(report.slots, np.int32).astype(np.int64)
        positions = np.frombuffer(report.positions, np.int32)
        self._note_cached(expert, report.cached_tokens)
        placed = table.placed[slots, expert]
        right = positions == table.prompt_lengths[slots, expert] + table.generated[slots]
        if not (placed & ~right).any():
            keep = placed
        else:
            keep = placed & right
            misplaced = slots[placed & ~right]
            table.placed[misplaced, expert] = False
            self._drop[expert] += misplaced.tolist()
            self._counters.position_faults += len(misplaced)
        rows = len(slots)
        if not rows:
            return slots
        table.keep_rows(
            expert,
            slots[keep],
            np.frombuffer(report.ids, np.int32).reshape(rows, -1)[keep],
            np.frombuffer(report.logprobs, np.float32).reshape(rows, -1)[keep],
            np.frombuffer(report.exact, np.float32).reshape(rows, -1)[keep],
            np.frombuffer(report.projected, np.float32).reshape(rows, -1)[keep],
        )
        return slots[keep]

    def _draw(self, slots: Int64) -> Drawn:
        """Fuse and sample `slots`."""
        with self._counters.phase("fuse"):
            fused = self._fuser.fuse(self._table, slots)
        with self._counters.phase("sample"):
            columns = choose(self._scores(fused), self._table.rules(slots), self._uniforms(slots))
        tokens = np.maximum(fused.ids[np.arange(len(slots)), columns], 0)
        wanted = np.flatnonzero(self._table.detailed[slots] & ~fused.lost)
        detailed = [(int(row), int(self._table.top_logprobs[slots[row]])) for row in wanted]
        return Drawn(fused, columns, tokens, self._table.sequence[slots], detailed)

    def _scores(self, fused: Fused) -> Float32:
        """Fused log-probabilities after bias, min_tokens and penalties: float32[B, U]."""
        table, slots = self._table, fused.slots
        bias = np.zeros_like(fused.logprobs)
        np.put_along_axis(bias, fused.exact_columns, table.exact_bias[slots], 1)
        early = table.generated[slots] < table.min_tokens[slots]
        scores = fused.logprobs + bias
        if early.any():
            stops = np.zeros(scores.shape, bool)
            np.put_along_axis(stops, fused.exact_columns, table.exact_is_stop[slots], 1)
            held = np.where(stops & early[:, None], np.float32(-np.inf), scores)
            # With nothing else to choose from, a stop token is chosen all the same.
            scores = np.where(np.isfinite(held).any(axis=1, keepdims=True), held, scores)
        if (found := table.penalties(slots, fused.ids)) is not None:
            rows, penalties = found
            scores[rows] = penalise(scores[rows], penalties)
        return scores

    def _uniforms(self, slots: Int64) -> np.ndarray:
        return uniforms(self._table.seeds[slots], self._table.generated[slots])

    def _count_barrier(self) -> None:
        """Per engine: how long its step took, and how long it then waited for the slowest."""
        reported = [link for link in self._links if link.report is not None]
        last = max((link.arrived_at for link in reported), default=0.0)
        for link in reported:
            counters = self._counters.experts[link.index]
            counters.barrier_wait_seconds += last - link.arrived_at
            if link.report is not None:
                counters.step_seconds.add(link.report.step_seconds)

    def _count_tick(self, drawn: Drawn | None) -> None:
        """A tick lasts from one start of the engines' steps to the next."""
        now = time.perf_counter()
        if drawn is not None:
            self._counters.ticks += 1
            self._counters.tick_seconds.add(now - self._step_started)
        self._step_started = now

    def _advance(self, drawn: Drawn) -> None:
        """Append the chosen tokens to their sequences."""
        self._table.advance(drawn.fused.slots, drawn.tokens)
        self._token_of[drawn.fused.slots] = drawn.tokens
        self._counters.tokens += len(drawn.tokens)
        self._counters.count_coefficients(drawn.fused.coefficients)

    def _step_engines(self) -> None:
        """Send every engine its tokens, drops, parks and adds: its next step starts, if anything is in it."""
        for link in self._links:
            if link.up and not link.owes_report:
                self._step_engine(link)

    def _step_engine(self, link: ExpertLink) -> None:
        table, expert = self._table, link.index
        adds = self._adds(expert)
        drop, self._drop[expert] = self._drop[expert], []
        park, self._park[expert] = self._park[expert], []
        if link.report is None and not (adds or drop or park):
            return
        rows = np.frombuffer(link.report.slots, np.int32) if link.report is not None else np.zeros(0, np.int32)
        table.placed[[add.slot for add in adds], expert] = True
        steps = bool(table.placed[:, expert].any())
        link.tick(self._counters.ticks, self._token_of[rows], drop, park, adds, steps=steps)

    def _adds(self, expert: int) -> list[Add]:
        """The sequences that this engine needs and does not have, oldest first."""
        table = self._table
        lacking = table.active & table.expected[:, expert] & ~table.placed[:, expert] & ~table.reported[:, expert]
        slots = np.flatnonzero(lacking)
        if not slots.size:
            return []
        return [self._add(slot, expert) for slot in slots[np.argsort(table.order[slots])].tolist()]

    def _add(self, slot: int, expert: int) -> Add:
        table = self._table
        request = table.requests[slot]
        if table.generated[slot]:
            self._counters.readded += 1
        return Add(
            slot=slot,
            sequence=request.id,
            tokens=table.tokens_for(slot, expert),
            priority=int(table.order[slot]),
            exact_ids=table.exact_ids_of(slot),
            temperature=request.temperatures[expert] if request.temperatures else 1.0,
            score=bool(table.needs_scores[slot] and not table.scored[slot, expert]),
        )

    # --- sequences come and go ------------------------------------------------------------------------------------

    def submit(self, requests: list[SequenceRequest]) -> None:
        """Queue sequences, all or none; each ends in one `Ended`."""
        if self.draining:
            return self._refuse(requests, "the server is shutting down", "overloaded")
        if problem := next((problem for request in requests if (problem := self._impossible(request))), None):
            return self._refuse(requests, problem, "too_long")
        if len(self._waiting) + len(requests) > self._config.limits.queue + self._free_slots():
            return self._refuse(requests, "the queue is full", "overloaded")
        for request in requests:
            self._waiting.push(request)
        return None

    def abort(self, sequences: list[int]) -> None:
        """Stop sequences, in every engine within one tick."""
        for sequence in sequences:
            if self._waiting.remove(sequence):
                self._counters.finished[FinishReason.ABORT] += 1
            elif (slot := self._table.slot_of.get(sequence)) is not None:
                self._counters.finished[FinishReason.ABORT] += 1
                self._leave(slot)

    def fail_all(self, message: str) -> None:
        """End everything that waits or runs with an error."""
        for sequence in self._waiting.clear():
            self._end(Ended(sequence, FinishReason.ERROR, message=message, code="overloaded"))
        for slot in self._table.active_slots().tolist():
            self._fail(slot, message)

    def note_scores(self, link: ExpertLink, scored: Scored) -> None:
        """An expert's log-probabilities of a prompt have come."""
        if (slot := self._table.slot_of.get(scored.sequence)) is not None:
            logprobs = np.frombuffer(scored.logprobs, np.float32)
            self._table.cross_entropy[slot, link.index] = -logprobs.mean() if logprobs.size else 0.0
            self._table.scored[slot, link.index] = True

    def lose_expert(self, link: ExpertLink) -> None:
        """An expert's engine is gone: what the configuration's `on_expert_loss` says happens to its sequences."""
        table, expert = self._table, link.index
        self._drop[expert].clear()
        self._park[expert].clear()
        table.placed[:, expert] = False
        slots = np.flatnonzero(table.active & table.expected[:, expert])
        if self._config.on_expert_loss == "wait":
            return
        if self._config.on_expert_loss == "degrade":
            table.lose(expert, slots)
            slots = slots[~table.expected[slots].any(axis=1)]
        for slot in slots.tolist():
            self._fail(slot, f"expert {link.name} was lost")

    @property
    def running(self) -> int:
        return len(self._table.requests)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._table.requests and not len(self._waiting)

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while there is room in every engine they need."""
        while not self._table.full and (head := self._waiting.peek()) is not None:
            order, request = head
            expected = self._expected(request)
            if not expected.any() or not self._has_room(request, expected):
                return
            self._waiting.pop()
            scores = isinstance(request.policy, Perplexity)
            slot = self._table.admit(
                request, order=order, policy=self._fuser.policies.acquire(request.policy), expected=expected, scores=scores
            )
            self._table.max_tokens[slot] = min(request.max_tokens, self._context_left(request))

    def _expected(self, request: SequenceRequest) -> np.ndarray:
        """bool[E]: the experts that `request` will use. Where lost experts are done without, those that are up."""
        expected = np.zeros(len(self._links), bool)
        expected[participants(request.policy, self._names)] = True
        if self._config.on_expert_loss == "degrade":
            expected &= [link.up for link in self._links]
        return expected

    def _has_room(self, request: SequenceRequest, expected: np.ndarray) -> bool:
        watermark = self._config.limits.kv_watermark
        for link in self._links:
            if expected[link.index] and link.info is not None:
                held = self._table.kv_tokens(link.index, link.info.block_size)
                if not fits(len(request.prompts[link.index]) + 1, held, link.info.kv_tokens, watermark):
                    return False
        return True

    def _context_left(self, request: SequenceRequest) -> int:
        """How many tokens can follow the prompt in every engine: its context, and its KV cache if it were alone."""
        left = [
            min(link.info.max_model_len, link.info.kv_tokens) - len(request.prompts[link.index])
            for link in self._links
            if link.info is not None and request.prompts[link.index]
        ]
        return min(left, default=0)

    def _impossible(self, request: SequenceRequest) -> str | None:
        """Why this request can never run, or None."""
        for index in participants(request.policy, self._names):
            if not request.prompts[index]:
                return "the prompt is empty"
        if self._context_left(request) < 1:
            return "the prompt is too long for an expert's context or KV cache"
        return None

    def _free_slots(self) -> int:
        return self._config.limits.sequences - self.running

    def _end_finished(self, drawn: Drawn | None) -> list[Ended]:
        """End the sequences that `drawn` finished; their terminal messages, to follow the token."""
        if drawn is None:
            return []
        table, slots = self._table, drawn.fused.slots
        stops = np.where(table.exact_is_stop[slots], table.exact_ids[slots], -1)
        stopped = (stops == drawn.tokens[:, None]).any(axis=1)
        broken = self._broken(drawn)
        over = stopped | broken | (table.generated[slots] >= table.max_tokens[slots])
        return [self._finish(drawn, row, bool(stopped[row]), bool(broken[row])) for row in np.flatnonzero(over)]

    def _broken(self, drawn: Drawn) -> np.ndarray:
        """bool[B]: rows that must not go on."""
        if self._config.gate is not None and self._config.gate.on_failure == "fail":
            return drawn.fused.lost | drawn.fused.ungated
        return drawn.fused.lost

    def _finish(self, drawn: Drawn, row: int, stopped: bool, broken: bool) -> Ended:
        slot = int(drawn.fused.slots[row])
        sequence = int(self._table.sequence[slot])
        cached = self._table.cached[slot]
        used = cached[cached >= 0]
        if broken:
            what = "no expert gave usable probabilities" if drawn.fused.lost[row] else "the gate failed"
            ended = Ended(sequence, FinishReason.ERROR, message=what)
        else:
            ended = Ended(
                sequence,
                FinishReason.STOP if stopped else FinishReason.LENGTH,
                stop_token=int(drawn.tokens[row]) if stopped else None,
                cached_tokens=int(used.min()) if used.size else 0,
            )
        self._counters.finished[ended.reason] += 1
        self._leave(slot)
        return ended

    def _fail(self, slot: int, message: str) -> None:
        sequence = int(self._table.sequence[slot])
        self._leave(slot)
        self._end(Ended(sequence, FinishReason.ERROR, message=message))

    def _leave(self, slot: int) -> None:
        """Take a sequence out of the table and out of every engine."""
        for expert in np.flatnonzero(self._table.expected[slot]).tolist():
            self._drop[expert].append(slot)
        self._fuser.policies.release(int(self._table.policy[slot]))
        self._table.release(slot)

    def _refuse(self, requests: list[SequenceRequest], message: str, code: str) -> None:
        for request in requests:
            self._end(Ended(request.id, FinishReason.ERROR, message=message, code=code))

    def _end(self, ended: Ended) -> None:
        self._counters.finished[ended.reason] += 1
        self.outbox.append(ended)

    def _note_cached(self, expert: int, cached_tokens: dict[int, int]) -> None:
        for sequence, cached in cached_tokens.items():
            slot = self._table.slot_of.get(sequence)
            if slot is not None and self._table.cached[slot, expert] < 0:
                self._table.cached[slot, expert] = cached

    def _emit(self, drawn: Drawn | None, ended: list[Ended]) -> None:
        """Queue a tick's tokens and terminal messages for the api."""
        if drawn is None:
            return
        good, sequences = ~drawn.fused.lost, drawn.sequences
        choices = {int(sequences[row]): self._choice(drawn, row, count) for row, count in drawn.detailed}
        if good.any():
            self.outbox.append(Progress(sequences[good].tolist(), drawn.tokens[good].tolist(), choices))
        self.outbox += ended

    def _choice(self, drawn: Drawn, row: int, count: int) -> Choice:
        """The chosen token's log-probability, the `count` best alternatives, and the coefficients."""
        logprobs, ids = drawn.fused.logprobs[row], drawn.fused.ids[row]
        best = np.argsort(-logprobs, kind="stable")[:count]
        top = [(int(ids[column]), float(logprobs[column])) for column in best if np.isfinite(logprobs[column])]
        return Choice(float(logprobs[drawn.columns[row]]), top, drawn.fused.coefficients[row].tolist())
