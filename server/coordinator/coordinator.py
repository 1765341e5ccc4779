"""The tick loop. `Coordinator.tick` is the algorithm of the whole project: every engine runs one step, the sequences
that all their experts reported are fused and sampled, and the tokens go back into every engine's KV cache.

Alignment is one rule. A sequence reported by all its experts in this tick is fused. A sequence reported by only some is
parked: the rows are kept, it leaves the engines that reported it (their KV stays in the prefix cache), and it is added
again, with its tokens so far, once its token is chosen. Different prompt lengths, chunked prefill, a preemption in one
engine, an expert's restart: all are this case, and no tick ever waits for a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.config import Config
from server.coordinator.admission import Admission
from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.compiled import compiled
from server.coordinator.fuser import Fused, Fuser
from server.coordinator.links import ExpertLink
from server.coordinator.sampling import choose, penalise, uniforms
from server.coordinator.stats import Counters
from server.coordinator.table import ExpertRows, SequenceTable
from server.coordinator.timings import Timings
from server.policy import essential
from server.request import FinishReason, SequenceRequest
from server.wire.api import Ended, Progress, Recorded, ToApi, TokenDetails
from server.wire.expert import Add, Refused, Report, Scored

_GOES_ON, _STOPPED, _TOO_LONG, _BROKEN = range(4)
_WORST = np.float32(1e30)
"""Cross-entropy of a prompt for which an expert gave no usable number."""
_NO_SLOTS = np.zeros(0, np.int32)
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a tick chose: for `fused` rows, the candidate `columns` int64[B] and their `tokens` int32[B].

    `sequences` int64[B] says whose they are, `detailed` (row, alternatives wanted) who asked for more than the token,
    `cached` (sequence -> prompt tokens found in every prefix cache) whose first token this is: all outlive the slots,
    which a sequence that ends gives up before its token is sent.
    """

    fused: Fused
    columns: Int64
    tokens: Int32
    sequences: Int64
    detailed: list[tuple[int, int]]
    cached: dict[int, int]


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
        self._admission = Admission(config, links, table, fuser.policies, counters.queue_seconds)
        self._drop: list[list[int]] = [[] for _ in links]
        self._park: list[list[int]] = [[] for _ in links]
        self._token_of = np.zeros(len(table.active), np.int32)
        self._timings = Timings(len(links))
        self.outbox: list[ToApi] = []
        self.draining = False

    # --- the tick ---

    def tick(self) -> None:
        """One tick, from the engines' reports to the start of their next step. Every stepping engine has reported."""
        self._count_reports()
        slots = self._align()
        self._counters.clock.lap("align")
        fused = self._fuse(slots)
        drawn = None if fused is None else self._draw(fused)
        if drawn is not None and self._table.recorded[drawn.fused.slots].any():
            self.outbox.append(self._record_rows(drawn))
        ended = self._advance(drawn) if drawn is not None else []
        self._admission.admit()
        if self._timings:
            self._timings.admitted(self._table.slot_of)
        self._step_engines()
        self._counters.clock.stop()
        if drawn is not None:
            self._emit(drawn, ended)
            self._counters.tally.count(drawn.fused.sources, drawn.fused.coefficients)

    def _align(self) -> Int64:
        """Keep the rows just reported; the slots that are complete, oldest first. Park the others that reported."""
        fresh = [
            (link, self._take_rows(link, link.report))
            for link in self._links
            if link.report is not None and link.report.slots
        ]
        complete = self._table.complete()
        going_on = np.zeros(len(self._table.active), bool)
        going_on[complete] = True
        for link, slots in fresh:
            if self._timings:
                self._timings.reported(link.index, self._table.sequence[slots].tolist(), link.arrived_at)
            self._set_aside(link, slots[~going_on[slots]])
        return complete

    def _set_aside(self, link: ExpertLink, slots: Int64) -> None:
        """Park `slots` in an engine; the rows that it reported stay."""
        if slots.size:
            self._table.placed[slots, link.index] = False
            self._park[link.index] += slots.tolist()
            self._counters.parked += len(slots)

    def _take_rows(self, link: ExpertLink, report: Report) -> Int64:
        """Keep a report's rows in the table; the slots they are for.

        A sequence reported at an unexpected position leaves the engine, to be added again.
        """
        slots = np.frombuffer(report.slots, np.int32)
        kept, misplaced = self._table.keep_rows(
            link.index,
            ExpertRows(
                slots,
                np.frombuffer(report.positions, np.int32),
                np.frombuffer(report.ids, np.int32).reshape(len(slots), -1),
                np.frombuffer(report.logprobs, np.float32).reshape(len(slots), -1),
                np.frombuffer(report.exact, np.float32).reshape(len(slots), -1),
                np.frombuffer(report.projected, np.float32).reshape(len(slots), -1),
            ),
        )
        if misplaced.size:
            self._table.placed[misplaced, link.index] = False
            self._drop[link.index] += misplaced.tolist()
            self._counters.position_faults += len(misplaced)
        for sequence, cached in report.cached_tokens.items():
            self._table.note_cached(sequence, link.index, cached)
            self._counters.experts[link.index].cached_tokens += cached
        return kept

    def _fuse(self, slots: Int64) -> Fused | None:
        """Fuse `slots`; None if nothing comes of it. Those about which an expert that was asked said nothing are parked
        in the other engines, as if it had not reported them: it is about to be lost."""
        if not slots.size:
            return None
        fused = self._fuser.fuse(self._table, slots)
        self._counters.clock.lap("fuse")
        if len(fused.slots) == len(slots):
            return fused
        left = np.setdiff1d(slots, fused.slots)
        for link in self._links:
            if link.up:
                self._set_aside(link, left[self._table.placed[left, link.index]])
        return fused if fused.slots.size else None

    def _draw(self, fused: Fused) -> Drawn:
        """Sample what was fused."""
        slots = fused.slots
        positions = self._table.generated[slots]
        numbers = uniforms(self._table.seeds[slots], np.maximum(positions - self._table.given[slots], 0))
        columns = choose(fused.ids, self._scores(fused), self._table.rules(slots), numbers)
        if ((forced := self._table.forced[slots]) >= 0).any():
            columns = np.where(forced >= 0, (fused.ids == forced[:, None]).argmax(axis=1), columns)
        tokens = np.maximum(fused.ids[np.arange(len(slots)), columns], 0)
        wanted = np.flatnonzero(self._table.detailed[slots])
        detailed = [(int(row), int(self._table.top_logprobs[slots[row]])) for row in wanted]
        sequences = self._table.sequence[slots]
        first = np.flatnonzero(positions == 0)
        cached = {int(sequences[row]): self._table.cached_tokens(slots[row]) for row in first}
        self._counters.clock.lap("sample")
        return Drawn(fused, columns, tokens, sequences, detailed, cached)

    def _record_rows(self, drawn: Drawn) -> Recorded:
        """What the experts showed for the sequences that asked; those that get no token are left out."""
        fused, table = drawn.fused, self._table
        rows = np.flatnonzero(table.recorded[fused.slots] & ~fused.lost)
        return Recorded(
            drawn.sequences[rows].tolist(),
            fused.sources.ids[rows].tobytes(),
            fused.sources.logprobs[rows].tobytes(),
            table.projected[fused.slots[rows]].tobytes(),
        )

    def _scores(self, fused: Fused) -> Float32:
        """Fused log-probabilities after bias, min_tokens and penalties: float32[B, U]."""
        table, slots, scores = self._table, fused.slots, fused.logprobs
        if (bias := table.exact_bias[slots]).any():
            shift = np.zeros_like(scores)
            np.put_along_axis(shift, fused.exact_columns, bias, 1)
            scores = scores + shift
        early = np.asarray(table.generated[slots] < table.min_tokens[slots])
        if early.any():
            stops = np.zeros(scores.shape, bool)
            np.put_along_axis(stops, fused.exact_columns, table.exact_is_stop[slots], 1)
            held = np.where(stops & early[:, None], np.float32(-np.inf), scores)
            # With nothing else to choose from, a stop token is chosen all the same.
            scores = np.where(np.isfinite(held).any(axis=1, keepdims=True), held, scores)
        if (found := table.penalties(slots, fused.ids)) is not None:
            rows, penalties = found
            scores = scores.copy()
            scores[rows] = penalise(scores[rows], penalties)
        return scores

    def _advance(self, drawn: Drawn) -> list[Ended]:
        """Append the chosen tokens to their sequences and end those that are done; their terminal messages."""
        table, slots = self._table, drawn.fused.slots
        table.advance(slots, drawn.tokens)
        self._token_of[slots] = drawn.tokens
        self._counters.tokens += len(drawn.tokens)
        fates = _fates(
            drawn.tokens,
            slots,
            table.exact_ids,
            table.exact_is_stop,
            table.generated,
            table.given,
            table.max_tokens,
            self._broken(drawn.fused),
        )
        return [self._finish(drawn, int(row), int(fates[row])) for row in np.flatnonzero(fates)]

    def _broken(self, fused: Fused) -> Bool:
        """bool[B]: rows that must not go on."""
        if self._config.gate is not None and self._config.gate.on_failure == "fail":
            return fused.lost | fused.ungated
        return fused.lost

    def _step_engines(self) -> None:
        """Send every engine its tokens, drops, parks and adds: its next step starts, if anything is in it."""
        lacking = self._table.lacking()
        some_lacking = bool(lacking.any())
        for link in self._links:
            if link.up and not link.owes_report:
                self._step_engine(link, np.flatnonzero(lacking[:, link.index]) if some_lacking else _NONE)

    def _step_engine(self, link: ExpertLink, lacking: Int64) -> None:
        table, expert = self._table, link.index
        adds = self._adds(expert, lacking) if lacking.size else []
        if link.report is None and not (adds or self._drop[expert] or self._park[expert]):
            return
        rows = _NO_SLOTS if link.report is None else np.frombuffer(link.report.slots, np.int32)
        link.tick(
            self._counters.ticks,
            self._token_of[rows],
            self._drop[expert],
            self._park[expert],
            adds,
            steps=bool(table.placed[:, expert].any()),
        )
        self._drop[expert], self._park[expert] = [], []

    def _adds(self, expert: int, slots: Int64) -> list[Add]:
        """Place `slots` in an engine, oldest first."""
        table = self._table
        table.placed[slots, expert] = True
        return [self._add(slot, expert) for slot in slots[np.argsort(table.order[slots])].tolist()]

    def _add(self, slot: int, expert: int) -> Add:
        table = self._table
        request = table.requests[slot]
        tokens = table.tokens_for(slot, expert)
        self._counters.readded += bool(table.generated[slot])
        self._counters.experts[expert].prefilled_tokens += len(tokens)
        return Add(
            slot=slot,
            sequence=request.id,
            tokens=tokens,
            priority=int(table.order[slot]),
            exact_ids=table.exact_ids_of(slot),
            temperature=request.temperatures[expert] if request.temperatures else 1.0,
            score=bool(table.needs_scores[slot] and not table.scored[slot, expert]),
            grammar=request.grammar,
            generated=int(table.generated[slot]),
            given=request.given[table.generated[slot] :],
        )

    def _emit(self, drawn: Drawn, ended: list[Ended]) -> None:
        """Queue a tick's tokens and terminal messages for the api."""
        sequences, tokens = drawn.sequences.tolist(), drawn.tokens.tolist()
        if drawn.fused.lost.any():
            good = np.flatnonzero(~drawn.fused.lost)
            sequences, tokens = drawn.sequences[good].tolist(), drawn.tokens[good].tolist()
        choices = {int(drawn.sequences[row]): _choice(drawn, row, count) for row, count in drawn.detailed}
        timings = self._timings.take(drawn.cached) if self._timings else {}
        self.outbox.append(Progress(sequences, tokens, choices, drawn.cached, timings))
        self.outbox += ended

    def _count_reports(self) -> None:
        """An engine that has done its step waits for the last one. Without any report this is no tick."""
        reports = [(link, link.report) for link in self._links if link.report is not None]
        self._counters.clock.start(max((report.step_seconds for _, report in reports), default=None))
        if not reports:
            return
        self._counters.ticks += 1
        slowest = max((link for link, _ in reports), key=lambda link: link.arrived_at)
        for link, report in reports:
            counters = self._counters.experts[link.index]
            counters.barrier_wait_seconds += slowest.arrived_at - link.arrived_at
            counters.step_seconds.observe(report.step_seconds)
        self._counters.experts[slowest.index].slowest_ticks += len(reports) > 1

    # --- sequences come and go ---

    def submit(self, requests: list[SequenceRequest]) -> None:
        """Queue sequences, all or none; each ends in one `Ended`."""
        refused = ("the server is shutting down", "overloaded") if self.draining else self._admission.enqueue(requests)
        if refused is not None:
            for request in requests:
                self._end(Ended(request.id, FinishReason.ERROR, message=refused[0], code=refused[1]))
        else:
            self._timings.queued(requests)

    def abort(self, sequences: list[int]) -> None:
        """Stop sequences, in every engine within one tick."""
        for sequence in sequences:
            self._timings.forget(sequence)
            slot = self._table.slot_of.get(sequence)
            if slot is not None:
                self._leave(slot)
            if slot is not None or self._admission.waiting.remove(sequence):
                self._counters.finished[FinishReason.ABORT] += 1

    def fail_all(self, message: str) -> None:
        """End everything that waits or runs with an error."""
        for sequence in self._admission.waiting.clear():
            self._end(Ended(sequence, FinishReason.ERROR, message=message, code="overloaded"))
        for slot in self._table.active_slots().tolist():
            self._fail(slot, message)

    def note_scores(self, link: ExpertLink, scored: Scored) -> None:
        """An expert's log-probabilities of a prompt have come."""
        if (slot := self._table.slot_of.get(scored.sequence)) is not None:
            logprobs = np.frombuffer(scored.logprobs, np.float32)
            entropy = -logprobs.mean() if logprobs.size else 0.0
            self._table.cross_entropy[slot, link.index] = entropy if np.isfinite(entropy) else _WORST
            self._table.scored[slot, link.index] = True

    def refuse(self, refused: Refused) -> None:
        """An engine cannot follow a sequence's grammar."""
        if (slot := self._table.slot_of.get(refused.sequence)) is not None:
            self._fail(slot, refused.message, code="invalid_grammar")

    def lose_expert(self, link: ExpertLink) -> None:
        """An expert's engine is gone: what the configuration's `on_expert_loss` says happens to its sequences."""
        table, expert = self._table, link.index
        self._drop[expert].clear()
        self._park[expert].clear()
        # A row it gave before its end cannot be asked about any more: it is computed again.
        table.placed[:, expert] = table.reported[:, expert] = False
        slots = np.flatnonzero(table.active & table.expected[:, expert])
        if self._config.on_expert_loss == "wait":
            return
        if self._config.on_expert_loss == "degrade":
            table.lose(expert, slots)
            slots = slots[[self._bereft(slot, link.name) for slot in slots.tolist()]]
        for slot in slots.tolist():
            self._fail(slot, f"expert {link.name} was lost")

    def _bereft(self, slot: int, lost: str) -> bool:
        """Whether the sequence in `slot` cannot go on without the expert `lost`."""
        return lost in essential(self._table.requests[slot].policy) or not self._table.expected[slot].any()

    def refit(self) -> None:
        """An expert came back, perhaps with a smaller KV cache: what no longer fits ends, the rest keeps within it."""
        for sequence in self._admission.remove_impossible():
            self._end(Ended(sequence, FinishReason.ERROR, message="the prompt no longer fits", code="too_long"))
        table = self._table
        for slot in table.active_slots().tolist():
            left = self._admission.context_left(table.requests[slot])
            table.max_tokens[slot] = min(table.max_tokens[slot], max(left, 0))
            if table.generated[slot] >= table.max_tokens[slot]:
                self._fail(slot, "an expert came back with too small a KV cache")

    @property
    def running(self) -> int:
        return len(self._table.requests)

    @property
    def waiting(self) -> int:
        return len(self._admission.waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def _finish(self, drawn: Drawn, row: int, fate: int) -> Ended:
        """End the sequence of a row; its terminal message, to follow its token."""
        slot, sequence = int(drawn.fused.slots[row]), int(drawn.sequences[row])
        if fate == _BROKEN:
            what = "no usable probabilities" if drawn.fused.lost[row] else "the gate failed"
            ended = Ended(sequence, FinishReason.ERROR, message=what)
        else:
            stopped = fate == _STOPPED
            ended = Ended(
                sequence,
                FinishReason.STOP if stopped else FinishReason.LENGTH,
                stop_token=int(drawn.tokens[row]) if stopped else None,
            )
        self._counters.finished[ended.reason] += 1
        self._leave(slot)
        return ended

    def _fail(self, slot: int, message: str, code: str = "") -> None:
        sequence = int(self._table.sequence[slot])
        self._leave(slot)
        self._end(Ended(sequence, FinishReason.ERROR, message=message, code=code))

    def _end(self, ended: Ended) -> None:
        self._counters.finished[ended.reason] += 1
        self._timings.forget(ended.sequence)
        self.outbox.append(ended)

    def _leave(self, slot: int) -> None:
        """Take a sequence out of the table and out of every engine."""
        for expert in np.flatnonzero(self._table.expected[slot]).tolist():
            self._drop[expert].append(slot)
        self._fuser.policies.release(int(self._table.policy[slot]))
        self._table.release(slot)


def _choice(drawn: Drawn, row: int, count: int) -> TokenDetails:
    """The chosen token's log-probability and rank, the `count` best alternatives, and the coefficients."""
    logprobs, ids = drawn.fused.logprobs[row], drawn.fused.ids[row]
    chosen = logprobs[drawn.columns[row]]
    best = np.argsort(-logprobs, kind="stable")[:count]
    top = [(int(ids[column]), float(logprobs[column])) for column in best if np.isfinite(logprobs[column])]
    rank = 1 + int((logprobs > chosen).sum())
    return TokenDetails(float(chosen), rank, top, drawn.fused.coefficients[row].tolist())


@compiled
def _fates(
    tokens: Int32,
    slots: Int64,
    exact_ids: Int32,
    is_stop: Bool,
    generated: Int32,
    given: Int32,
    max_tokens: Int32,
    broken: Bool,
) -> npt.NDArray[np.int8]:
    """int8[B]: what becomes of each row's sequence after its token."""
    fates = np.full(len(tokens), _GOES_ON, np.int8)
    for row in range(len(tokens)):
        slot = slots[row]
        if generated[slot] >= max_tokens[slot]:
            fates[row] = _TOO_LONG
        for column in range(exact_ids.shape[1] if generated[slot] > given[slot] else 0):
            if is_stop[slot, column] and exact_ids[slot, column] == tokens[row]:
                fates[row] = _STOPPED
        if broken[row]:
            fates[row] = _BROKEN
    return fates
