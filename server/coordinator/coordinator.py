"""The tick loop. `Coordinator.tick` is the algorithm of the whole project: every engine runs one step, the sequences
that all their experts reported are fused and sampled, and the tokens go back into every engine's KV cache.

Alignment is one rule. A sequence reported by all its experts in this tick is fused. A sequence reported by only some is
parked: the rows are kept, it leaves the engines that reported it (their KV stays in the prefix cache), and it is added
again, with its tokens so far, once its token is sampled. Different prompt lengths, chunked prefill, a preemption in one
engine, an expert's restart: all are this case, and no tick ever waits for a row.
"""

from __future__ import annotations

import numpy as np

from server.config import Config
from server.coordinator.admission import Admission
from server.coordinator.arrays import Int64
from server.coordinator.clock import Phase, timed
from server.coordinator.fuser import Fused, Fuser
from server.coordinator.lifecycle import Lifecycle
from server.coordinator.links import ExpertLink
from server.coordinator.observer import Observer
from server.coordinator.rows import ExpertRows
from server.coordinator.sampler import Draft, Sampled, draft, settle
from server.coordinator.table import SequenceTable
from server.policy import needs_entropy
from server.wire.api import Ended, Progress
from server.wire.expert import Add, Report

_NO_SLOTS = np.zeros(0, np.int32)
_NONE = np.zeros(0, np.int64)


class Coordinator:
    """Talks to experts through `links`, and to the api through the outbox of its `sequences`."""

    def __init__(
        self, config: Config, links: list[ExpertLink], fuser: Fuser, table: SequenceTable, observer: Observer
    ) -> None:
        self._links = links
        self._fuser = fuser
        self._table = table
        self._observer = observer
        self._tolerance = config.tolerance
        self._admission = Admission(config, links, table, fuser.policies, observer)
        self.clock = observer.clock
        self.sequences = Lifecycle(config, links, table, fuser.policies, self._admission, observer)

    def tick(self) -> None:
        """One tick, from the engines' reports to the start of their next step. Every stepping engine has reported."""
        sampled: Sampled | None = None
        ended: list[Ended] = []
        with self._observer.tick(self._links):
            slots = self._align()
            if slots.size:
                sampled = self._complete(self._sample(self._fuse(slots)))
                ended = self._advance(sampled)
            self._admission.admit()
            self._step()
        if sampled is not None and sampled.tokens.size:
            self._emit(sampled, ended)

    # --- align ---

    @timed(Phase.ALIGN)
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
            self._park(link, slots[~going_on[slots]])
        return complete

    def _take_rows(self, link: ExpertLink, report: Report) -> Int64:
        """Keep a report's rows in the table; the slots they are for.

        A sequence reported at an unexpected position leaves the engine, to be added again.
        """
        kept, misplaced = self._table.keep_rows(link.index, ExpertRows.of(report))
        if misplaced.size:
            self._table.placed[misplaced, link.index] = False
            link.drop += misplaced.tolist()
        for sequence, cached in report.cached_tokens.items():
            self._table.note_cached(sequence, link.index, cached)
        self._observer.reported(link, report, self._table.sequence, kept, misplaced)
        return kept

    def _park(self, link: ExpertLink, slots: Int64) -> None:
        """Take `slots` out of an engine for a while; the rows that it reported stay."""
        if slots.size:
            self._table.placed[slots, link.index] = False
            link.park += slots.tolist()
            self._observer.parked(len(slots))

    # --- fuse, sample, advance ---

    @timed(Phase.FUSE)
    def _fuse(self, slots: Int64) -> Fused:
        """What the experts' lists say of the fused distributions."""
        return self._fuser.fuse(self._table, slots)

    @timed(Phase.SAMPLE)
    def _sample(self, fused: Fused) -> Draft:
        """A token for each fused row, as far as the lists settle it."""
        return draft(self._table, fused, self._tolerance)

    @timed(Phase.SAMPLE)
    def _complete(self, drafted: Draft) -> Sampled:
        """The same once the experts have been asked for the whole of the rows that are open. Those about which one that
        was asked said nothing are left out, and parked in the other engines as if it had not reported them: it is about
        to be lost."""
        rows = drafted.open
        whole = self._fuser.whole_rows(drafted.fused, rows, drafted.recorded) if rows.size else {}
        if len(whole) < len(rows):
            answered = np.ones(len(drafted.columns), bool)
            answered[[row for row in rows.tolist() if row not in whole]] = False
            self._park_everywhere(drafted.fused.slots[~answered])
            places = np.cumsum(answered) - 1
            whole = {int(places[row]): known for row, known in whole.items()}
            drafted = drafted.only(answered)
        return settle(self._table, drafted, whole)

    def _park_everywhere(self, slots: Int64) -> None:
        for link in self._links:
            if link.up:
                self._park(link, slots[self._table.placed[slots, link.index]])

    def _advance(self, sampled: Sampled) -> list[Ended]:
        """Append the sampled tokens to their sequences and end those that are done; their terminal messages."""
        fused = sampled.fused
        self._table.gate_state[fused.slots] = fused.gate_state
        self._table.advance(fused.slots, sampled.tokens)
        return self.sequences.finish(sampled)

    # --- step ---

    def _step(self) -> None:
        """Send every engine its tokens, drops, parks and adds: its next step starts, if anything is in it."""
        lacking = self._table.lacking()
        some_lacking = bool(lacking.any())
        for link in self._links:
            if link.up and not link.owes_report:
                self._step_engine(link, np.flatnonzero(lacking[:, link.index]) if some_lacking else _NONE)

    def _step_engine(self, link: ExpertLink, lacking: Int64) -> None:
        table = self._table
        adds = self._adds(link, lacking) if lacking.size else []
        if link.report is None and not (adds or link.drop or link.park):
            return
        rows = _NO_SLOTS if link.report is None else np.frombuffer(link.report.slots, np.int32)
        link.tick(
            self._observer.counters.ticks, table.last_tokens[rows], adds, steps=bool(table.placed[:, link.index].any())
        )

    def _adds(self, link: ExpertLink, slots: Int64) -> list[Add]:
        """Place `slots` in an engine, oldest first."""
        table = self._table
        table.placed[slots, link.index] = True
        return [self._add(slot, link) for slot in slots[np.argsort(table.order[slots])].tolist()]

    def _add(self, slot: int, link: ExpertLink) -> Add:
        table, expert = self._table, link.index
        request = table.requests[slot]
        tokens = table.tokens_for(slot, expert)
        generated = int(table.lengths.generated[slot])
        self._observer.placed(link, len(tokens), again=bool(generated))
        return Add(
            slot=slot,
            sequence=request.id,
            tokens=tokens,
            priority=int(table.order[slot]),
            exact_ids=table.exact_ids_of(slot),
            temperature=request.temperatures[expert] if request.temperatures else 1.0,
            score=bool(table.needs_scores[slot] and not table.scored[slot, expert]),
            entropy=needs_entropy(request.policy),
            grammar=request.grammar,
            generated=generated,
            given=request.given[generated:],
        )

    # --- emit ---

    def _emit(self, sampled: Sampled, ended: list[Ended]) -> None:
        """Queue a tick's tokens and terminal messages for the api, and count them: the engines are at work."""
        outbox, sequences, tokens = self.sequences.outbox, sampled.sequences.tolist(), sampled.tokens.tolist()
        if sampled.lost.any():
            good = np.flatnonzero(~sampled.lost)
            sequences, tokens = sampled.sequences[good].tolist(), sampled.tokens[good].tolist()
        details = {int(sampled.sequences[row]): sampled.details(row, count) for row, count in sampled.detailed}
        timings = self._observer.first_tokens(sampled.cached)
        if sampled.record is not None:
            outbox.append(sampled.record)
        outbox.append(Progress(sequences, tokens, details, sampled.cached, timings))
        outbox += ended
        self._observer.generated(sampled, ended)
