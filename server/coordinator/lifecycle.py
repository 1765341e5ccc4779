"""Life and death of sequences: they are submitted, aborted, refused, finish, fail, and lose an expert."""

from __future__ import annotations

import numpy as np

from server.config import Config
from server.coordinator.admission import Admission
from server.coordinator.arrays import Bool, Int8, Int32, Int64
from server.coordinator.compiled import compiled
from server.coordinator.links import ExpertLink
from server.coordinator.observer import Observer
from server.coordinator.policy_book import PolicyBook
from server.coordinator.rows import Lengths
from server.coordinator.sampler import Sampled
from server.coordinator.table import ExactIds, SequenceTable
from server.policy import essential
from server.request import FinishReason, SequenceRequest
from server.wire.api import Ended, ToApi
from server.wire.expert import Refused, Scored

_GOES_ON, _STOP, _LENGTH, _ERROR = range(4)
_WORST = np.float32(1e30)
"""Cross-entropy of a prompt for which an expert gave no usable number."""


class Lifecycle:
    """Every sequence that is submitted ends in one `Ended`, unless it is aborted."""

    def __init__(
        self,
        config: Config,
        links: list[ExpertLink],
        table: SequenceTable,
        policies: PolicyBook,
        admission: Admission,
        observer: Observer,
    ) -> None:
        self._config = config
        self._links = links
        self._table = table
        self._policies = policies
        self._admission = admission
        self._observer = observer
        self.outbox: list[ToApi] = []
        """What the api is to be told."""
        self.draining = False
        """No new sequences are taken."""

    @property
    def running(self) -> int:
        return len(self._table.requests)

    @property
    def waiting(self) -> int:
        return len(self._admission.waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    # --- as the api says ---

    def submit(self, requests: list[SequenceRequest]) -> None:
        """Queue sequences, all or none."""
        refused = ("the server is shutting down", "overloaded") if self.draining else self._admission.enqueue(requests)
        if refused is None:
            self._observer.queued(requests)
            return
        for request in requests:
            self._end(request.id, *refused)

    def abort(self, sequences: list[int]) -> None:
        """Stop sequences, in every engine within one tick."""
        for sequence in sequences:
            slot = self._table.slot_of.get(sequence)
            if slot is not None:
                self._release(slot)
            if slot is not None or self._admission.waiting.remove(sequence):
                self._observer.ended(sequence, FinishReason.ABORT)

    def fail_all(self, message: str) -> None:
        """End everything that waits or runs with an error."""
        for sequence in self._admission.waiting.clear():
            self._end(sequence, message, "overloaded")
        for slot in self._table.active_slots().tolist():
            self._fail(slot, message)

    # --- as tokens come ---

    def finish(self, sampled: Sampled) -> list[Ended]:
        """Release the sequences whose last token this is; their terminal messages, to follow their tokens."""
        reasons = _finish_reasons(
            sampled.tokens,
            sampled.fused.slots,
            self._failed(sampled),
            self._table.exact,
            self._table.lengths,
        )
        ended = []
        for row in np.flatnonzero(reasons).tolist():
            ended.append(_last_message(sampled, row, int(reasons[row])))
            self._release(int(sampled.fused.slots[row]))
        return ended

    def _failed(self, sampled: Sampled) -> Bool:
        """bool[B]: rows that must not go on."""
        if self._config.gate is not None and self._config.gate.on_failure == "fail":
            return sampled.lost | sampled.fused.ungated
        return sampled.lost

    # --- as experts say, come and go ---

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
            self._fail(slot, refused.message, "invalid_grammar")

    def lose_expert(self, link: ExpertLink) -> None:
        """An expert's engine is gone: what the configuration's `on_expert_loss` says happens to its sequences."""
        table, expert = self._table, link.index
        # A row it gave before its end cannot be asked about any more: it is computed again.
        table.placed[:, expert] = table.rows.reported[:, expert] = False
        slots = np.flatnonzero(table.active & table.expected[:, expert])
        if self._config.on_expert_loss == "wait":
            return
        if self._config.on_expert_loss == "degrade":
            table.lose(expert, slots)
            slots = slots[[self._needs(slot, link.name) for slot in slots.tolist()]]
        for slot in slots.tolist():
            self._fail(slot, f"expert {link.name} was lost")

    def _needs(self, slot: int, lost: str) -> bool:
        """Whether the sequence in `slot` cannot go on without the expert `lost`."""
        return lost in essential(self._table.requests[slot].policy) or not self._table.expected[slot].any()

    def refit(self) -> None:
        """An expert came back, perhaps with a smaller KV cache: what no longer fits ends, the rest keeps within it."""
        for sequence in self._admission.remove_impossible():
            self._end(sequence, "the prompt no longer fits", "too_long")
        lengths = self._table.lengths
        for slot in self._table.active_slots().tolist():
            left = self._admission.context_left(self._table.requests[slot])
            lengths.max_tokens[slot] = min(lengths.max_tokens[slot], max(left, 0))
            if lengths.generated[slot] >= lengths.max_tokens[slot]:
                self._fail(slot, "an expert came back with too small a KV cache")

    # --- the end ---

    def _fail(self, slot: int, message: str, code: str = "") -> None:
        """End a running sequence with an error."""
        sequence = int(self._table.sequence[slot])
        self._release(slot)
        self._end(sequence, message, code)

    def _end(self, sequence: int, message: str, code: str) -> None:
        """Say that a sequence, which no longer runs or never did, has ended in an error."""
        self._observer.ended(sequence, FinishReason.ERROR)
        self.outbox.append(Ended(sequence, FinishReason.ERROR, message=message, code=code))

    def _release(self, slot: int) -> None:
        """Take a sequence out of the table and out of every engine."""
        for expert in np.flatnonzero(self._table.expected[slot]).tolist():
            self._links[expert].drop.append(slot)
        self._policies.release(int(self._table.policy[slot]))
        self._table.release(slot)


def _last_message(sampled: Sampled, row: int, reason: int) -> Ended:
    sequence = int(sampled.sequences[row])
    if reason == _ERROR:
        problem = "no usable probabilities" if sampled.lost[row] else "the gate failed"
        return Ended(sequence, FinishReason.ERROR, message=problem)
    if reason == _STOP:
        return Ended(sequence, FinishReason.STOP, stop_token=int(sampled.tokens[row]))
    return Ended(sequence, FinishReason.LENGTH)


@compiled
def _finish_reasons(tokens: Int32, slots: Int64, failed: Bool, exact: ExactIds, lengths: Lengths) -> Int8:
    """int8[B]: why each row's sequence ends after its token, or that it goes on."""
    reasons = np.full(len(tokens), _GOES_ON, np.int8)
    for row in range(len(tokens)):
        slot = slots[row]
        if lengths.generated[slot] >= lengths.max_tokens[slot]:
            reasons[row] = _LENGTH
        if lengths.generated[slot] > lengths.given[slot]:
            for column in range(exact.ids.shape[1]):
                if exact.is_stop[slot, column] and exact.ids[slot, column] == tokens[row]:
                    reasons[row] = _STOP
        if failed[row]:
            reasons[row] = _ERROR
    return reasons
