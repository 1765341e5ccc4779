"""From kept rows to fused distributions: candidates, missing probabilities, the gate, each policy's rule, the fusion.

The only place where the pure arithmetic of `fusion` and `coefficients` meets the sequence table, the gate and, for
`missing: exact`, the experts. Letters: B rows, E experts, K top-k, X exact ids, U candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.coefficients import Evidence, coefficients, plausible, space
from server.coordinator.fusion import CandidateTable, combine, fill_tail, tabulate
from server.coordinator.gate_runner import GateRunner
from server.coordinator.stats import Counters
from server.coordinator.table import SequenceTable
from server.coordinator.tally import Sources
from server.policy import Policy, needs_gate

LookUp = Callable[[dict[int, tuple[Int32, Int32]]], dict[int, Float32]]
"""expert -> (slots int32[B], ids int32[B, U]) in, expert -> log-probabilities float32[B, U] out. Experts that do not
answer are left out."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """The rows that the table keeps of `slots` [B]: `ids` int32[B, E, K] and `logprobs` float32[B, E, K], emptied where
    an expert is not `available` bool[B, E]; `found`: the candidates, before any look-up."""

    slots: Int64
    ids: Int32
    logprobs: Float32
    available: Bool
    found: CandidateTable

    def only(self, rows: Bool) -> _Kept:
        """Those of the `rows` bool[B]."""
        return _Kept(self.slots[rows], self.ids[rows], self.logprobs[rows], self.available[rows], self.found.only(rows))


@dataclass(frozen=True, slots=True)
class Fused:
    """Fused distributions of `slots` [B], over the candidates `ids` int32[B, U] (-1: none).

    `logprobs` float32[B, U] normalised over the candidates; `coefficients` float32[B, E]; `exact_columns` int64[B, X]:
    where each row's exact ids stand; `lost` bool[B]: rows for which no expert, or not one that is essential to the
    policy, gave a usable distribution; `ungated` bool[B]: rows whose gate failed; `sources`: what all this was made
    from.
    """

    slots: Int64
    ids: Int32
    logprobs: Float32
    coefficients: Float32
    exact_columns: Int64
    lost: Bool
    ungated: Bool
    sources: Sources


class Fuser:
    """Fuses the rows of a tick, batched, one rule after another."""

    def __init__(
        self,
        experts: list[str],
        vocabulary: int,
        gate: GateRunner | None,
        missing: Literal["tail", "exact"],
        look_up: LookUp,
        counters: Counters,
    ) -> None:
        self._experts = experts
        self._vocabulary = vocabulary
        self._gate = gate
        self._missing = missing
        self._look_up = look_up
        self._counters = counters
        self.policies = PolicyBook()

    def replace_gate(self, gate: GateRunner) -> None:
        """Ask `gate` from now on; its projected and state sizes are the old one's."""
        self._gate = gate

    def fuse(self, table: SequenceTable, slots: Int64) -> Fused:
        """Fuse the kept rows of `slots` (each complete) and advance their gate state. A row that an expert was asked
        about and did not answer is left out: it is not what its token should be fused from."""
        kept = self._keep(table, slots)
        listed = kept.found
        if self._missing == "exact":
            kept, listed = self._look_up_missing(kept)
        self._mask_unusable(table, kept)
        values = fill_tail(listed, kept.logprobs[:, :, -1], self._vocabulary)
        gated, ungated = self._run_gate(table, kept)
        chosen, prob_space, allowed = self._apply_rules(table, kept, values, gated)
        fused = combine(values, listed, chosen, prob_space, allowed)
        return Fused(
            slots=kept.slots,
            ids=listed.ids,
            logprobs=fused,
            coefficients=chosen,
            exact_columns=listed.exact_columns,
            lost=(fused.max(axis=1) == -np.inf) | ~kept.available.any(axis=1) | ~chosen.any(axis=1),
            ungated=ungated,
            sources=Sources(kept.ids, kept.logprobs, kept.available, kept.found, prob_space, self._vocabulary),
        )

    def _keep(self, table: SequenceTable, slots: Int64) -> _Kept:
        """The kept rows; empty are those of experts that gave none, or one that is NaN or -inf throughout."""
        ids, logprobs, exact = table.ids[slots], table.logprobs[slots], table.exact_logprobs[slots]
        available = table.expected[slots] & table.usable[slots]
        if not available.all():
            ids[~available], logprobs[~available], exact[~available] = -1, -np.inf, -np.inf
        found = tabulate(ids, logprobs, table.exact_ids[slots], exact, self._vocabulary)
        return _Kept(slots, ids, logprobs, available, found)

    def _mask_unusable(self, table: SequenceTable, kept: _Kept) -> None:
        """Count the rows that are not available though they were given, and have neither the gate nor a record show
        what such an expert projected."""
        if kept.available.all():
            return
        for expert, counters in enumerate(self._counters.experts):
            counters.masked_rows += int((table.expected[kept.slots, expert] & ~kept.available[:, expert]).sum())
        rows, experts = np.nonzero(~kept.available)
        table.projected[kept.slots[rows], experts] = 0

    def _look_up_missing(self, kept: _Kept) -> tuple[_Kept, CandidateTable]:
        """Ask each available expert for the candidates that it did not list itself: the rows for which all answered,
        and what is known of their candidates then."""
        found = kept.found
        present = (found.ids >= 0)[:, None, :]
        lacking = (~found.listed & present).any(axis=2) & kept.available
        rows_of = {int(e): np.flatnonzero(lacking[:, e]) for e in np.flatnonzero(lacking.any(axis=0))}
        if not rows_of:
            return kept, found
        answers = self._ask(kept, rows_of)
        known = _filled_in(found, rows_of, answers)
        if len(answers) == len(rows_of):
            return kept, known
        answered = np.ones(len(kept.slots), bool)
        for expert in rows_of.keys() - answers.keys():
            answered[rows_of[expert]] = False
        return kept.only(answered), known.only(answered)

    def _ask(self, kept: _Kept, rows_of: dict[int, Int64]) -> dict[int, Float32]:
        """Each expert's log-probabilities [B', U] of the candidates of its B' rows."""
        self._counters.clock.lap("fuse")
        wanted = {
            expert: (kept.slots[rows].astype(np.int32), np.ascontiguousarray(kept.found.ids[rows]))
            for expert, rows in rows_of.items()
        }
        answers = self._look_up(wanted)
        self._counters.clock.lap("look_up")
        return answers

    def _run_gate(self, table: SequenceTable, kept: _Kept) -> tuple[Float32, Bool]:
        """The gate's coefficients [B, E] for rows whose policy asks it (elsewhere 0), and where it failed."""
        slots, ids, logprobs = kept.slots, kept.ids, kept.logprobs
        gated = np.zeros(ids.shape[:2], np.float32)
        ungated = np.zeros(len(slots), bool)
        if self._gate is None:
            return gated, ungated
        asked = np.flatnonzero(self.policies.gated(table.policy[slots]))
        if not asked.size:
            return gated, ungated
        self._counters.clock.lap("fuse")
        rows = slots[asked]
        output = self._gate(logprobs[asked], ids[asked], table.projected[rows], table.gate_state[rows])
        table.gate_state[rows] = output.state
        self._counters.gate_failures += int(output.failed.sum())
        gated[asked], ungated[asked] = output.coefficients, output.failed
        self._counters.clock.lap("gate")
        return gated, ungated

    def _apply_rules(
        self, table: SequenceTable, kept: _Kept, values: Float32, gated: Float32
    ) -> tuple[Float32, Bool, Bool | None]:
        """(coefficients [B, E], rows in prob space [B], allowed candidates [B, U] or None), policy by policy."""
        slots, logprobs, available = kept.slots, kept.logprobs, kept.available
        chosen = np.empty(available.shape, np.float32)
        prob_space = np.zeros(len(slots), bool)
        allowed: Bool | None = None
        numbers = table.policy[slots]
        present = self.policies.present(numbers)
        for number, policy in present:
            rows = slice(None) if len(present) == 1 else np.flatnonzero(numbers == number)
            evidence = Evidence(
                logprobs[rows], available[rows], gated[rows], table.cross_entropy[slots[rows]], self._vocabulary
            )
            chosen[rows] = coefficients(policy, self._experts, evidence)
            prob_space[rows] = space(policy, self._gate.space if self._gate else "logprob") == "prob"
            if (mask := plausible(policy, self._experts, values[rows])) is not None:
                allowed = np.ones((len(slots), values.shape[2]), bool) if allowed is None else allowed
                allowed[rows] = mask
        return chosen, prob_space, allowed


def _filled_in(found: CandidateTable, rows_of: dict[int, Int64], answers: dict[int, Float32]) -> CandidateTable:
    """`found` with what experts answered about their rows."""
    logprobs, listed = found.logprobs.copy(), found.listed.copy()
    for expert, answer in answers.items():
        rows = rows_of[expert]
        logprobs[rows, expert] = np.where(listed[rows, expert], logprobs[rows, expert], answer)
        listed[rows, expert] |= found.ids[rows] >= 0
    return CandidateTable(found.ids, logprobs, listed, found.exact_columns)


class PolicyBook:
    """Numbers the policies in use, so that rows of one policy can be found in an array."""

    def __init__(self) -> None:
        self._number: dict[Policy, int] = {}
        self._policy: dict[int, Policy] = {}
        self._users: dict[int, int] = {}
        self._next = 0

    def acquire(self, policy: Policy) -> int:
        """The number of `policy`, for one more sequence."""
        if (number := self._number.get(policy)) is None:
            number = self._number[policy] = self._next
            self._policy[number] = policy
            self._users[number] = 0
            self._next += 1
        self._users[number] += 1
        return number

    def release(self, number: int) -> None:
        """One sequence less; a policy without any is forgotten."""
        self._users[number] -= 1
        if not self._users[number]:
            del self._number[self._policy.pop(number)], self._users[number]

    def present(self, numbers: Int32) -> list[tuple[int, Policy]]:
        """The policies among `numbers`."""
        return [(number, self._policy[number]) for number in set(numbers.tolist())]

    def gated(self, numbers: Int32) -> Bool:
        """bool[B]: which of `numbers` [B] are policies that ask the gate."""
        return np.isin(numbers, [number for number, policy in self.present(numbers) if needs_gate(policy)])
