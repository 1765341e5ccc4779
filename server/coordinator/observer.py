"""What is measured beside the coordinator's work. The algorithm tells the observer what has happened; no token depends
on what the observer knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from server.coordinator.arrays import Int64
from server.coordinator.clock import TickClock
from server.coordinator.counters import Counters
from server.coordinator.links import ExpertLink
from server.coordinator.sampler import Sampled
from server.coordinator.tally import TokenTally
from server.coordinator.timings import Timings
from server.request import FinishReason, SequenceRequest
from server.wire.api import Ended, SequenceTiming
from server.wire.expert import Report


class Observer:
    """Clock, counters and tally of a coordinator over `experts` experts, and the moments of traced requests."""

    def __init__(self, experts: int) -> None:
        self.clock = TickClock()
        self.counters = Counters(experts)
        self.tally = TokenTally(experts)
        self._timings = Timings(experts)

    # --- a tick ---

    @contextmanager
    def tick(self, links: Sequence[ExpertLink]) -> Iterator[None]:
        """From the engines' reports to the start of their next step. Without any report it is not counted as a tick."""
        reports = [(link, link.report.step_seconds) for link in links if link.report is not None]
        self.clock.start(max((seconds for _, seconds in reports), default=None))
        if reports:
            self._count_steps(reports)
        yield
        self.clock.stop()

    def _count_steps(self, reports: list[tuple[ExpertLink, float]]) -> None:
        """An engine that has done its step waits for the last one."""
        slowest = max((link for link, _ in reports), key=lambda link: link.arrived_at)
        for link, seconds in reports:
            counters = self.counters.experts[link.index]
            counters.barrier_wait_seconds += slowest.arrived_at - link.arrived_at
            counters.step_seconds.observe(seconds)
        self.counters.ticks += 1
        self.counters.experts[slowest.index].slowest_ticks += len(reports) > 1

    def reported(self, link: ExpertLink, report: Report, sequence: Int64, kept: Int64, misplaced: Int64) -> None:
        """An engine has shown the distributions of the slots `kept`, and of some at an unexpected position; `sequence`
        [S] says what runs in each slot."""
        if self._timings:
            self._timings.reported(link.index, sequence[kept].tolist(), link.arrived_at)
        lists = (report.ids, report.logprobs, report.exact, report.entropies, report.projected)
        self.counters.experts[link.index].received_bytes["lists"] += sum(map(len, lists))
        if report.cached_tokens:
            self.counters.experts[link.index].cached_tokens += sum(report.cached_tokens.values())
        self.counters.position_faults += len(misplaced)

    def fetched(self, expert: int, rows: int, vocabulary: int) -> None:
        """An expert has shown that many rows whole."""
        self.counters.experts[expert].received_bytes["rows"] += 4 * rows * vocabulary

    def parked(self, sequences: int) -> None:
        """That many have left an engine for a while."""
        self.counters.parked += sequences

    def placed(self, link: ExpertLink, tokens: int, *, again: bool) -> None:
        """A sequence of that many tokens goes to an engine; `again`: in the middle of its answer."""
        self.counters.readded += again
        self.counters.experts[link.index].prefilled_tokens += tokens

    def generated(self, sampled: Sampled, ended: Iterable[Ended]) -> None:
        """Each row has its token, and some sequences their last."""
        fused = sampled.fused
        self.counters.tokens += len(fused.slots)
        self.counters.gate_failures += int(np.count_nonzero(fused.ungated))
        if np.count_nonzero(fused.available) < fused.available.size:
            masked = np.count_nonzero(fused.expected & ~fused.available, axis=0)
            for counters, rows in zip(self.counters.experts, masked.tolist(), strict=True):
                counters.masked_rows += rows
        self.tally.count(fused)
        for bound in sampled.bounds().tolist():
            self.counters.bound.observe(bound)
        for row in sampled.whole:
            self.counters.whole_rows["token" if sampled.draft.columns[row] < 0 else "logprobs"] += 1
        for each in ended:
            self.ended(each.sequence, each.reason)

    # --- a sequence ---

    def queued(self, requests: list[SequenceRequest]) -> None:
        """They wait."""
        self._timings.queued(requests)

    def admitted(self, sequence: int, waited: float) -> None:
        """It has a slot, after that many seconds."""
        self.counters.queue_seconds.observe(waited)
        self._timings.admitted(sequence)

    def first_tokens(self, sequences: Iterable[int]) -> dict[int, SequenceTiming]:
        """They have their first token: the moments of those that are timed."""
        return self._timings.take(sequences) if self._timings else {}

    def ended(self, sequence: int, reason: FinishReason) -> None:
        """It is over."""
        self.counters.finished[reason] += 1
        self._timings.forget(sequence)
