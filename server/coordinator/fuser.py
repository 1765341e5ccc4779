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
from server.coordinator.clock import Phase, TickClock, timed
from server.coordinator.coefficients import Evidence, coefficients, plausible, space
from server.coordinator.compiled import compiled
from server.coordinator.fusion import CandidateTable, combine, fill_tail, tabulate
from server.coordinator.gate_runner import GateOutput, GateRunner
from server.coordinator.policy_book import PolicyBook
from server.coordinator.table import SequenceTable
from server.coordinator.tally import Sources

LookUp = Callable[[dict[int, tuple[Int32, Int32]]], dict[int, Float32]]
"""expert -> (slots int32[B], ids int32[B, U]) in, expert -> log-probabilities float32[B, U] out. Experts that do not
answer are left out."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the table keeps of B sequences."""

    slots: Int64
    """[B]: theirs."""

    ids: Int32
    """[B, E, K]: the experts' lists, best first; -1 where one is not available."""

    logprobs: Float32
    """[B, E, K]: of `ids`; -inf where one is not available."""

    expected: Bool
    """[B, E]: the experts that the policy asks."""

    available: Bool
    """[B, E]: those of them whose row is usable."""

    found: CandidateTable
    """The candidates, before any look-up."""

    def only(self, rows: Bool) -> _Rows:
        """Those of the `rows` bool[B]."""
        return _Rows(
            self.slots[rows],
            self.ids[rows],
            self.logprobs[rows],
            self.expected[rows],
            self.available[rows],
            self.found.only(rows),
        )


@dataclass(frozen=True, slots=True)
class Fused:
    """Fused distributions of B sequences."""

    slots: Int64
    """[B]: theirs."""

    ids: Int32
    """[B, U]: the candidates, -1: none."""

    logprobs: Float32
    """[B, U]: of the candidates, over which they are normalised."""

    coefficients: Float32
    """[B, E]: what they were fused with."""

    exact_columns: Int64
    """[B, X]: where each row's exact ids stand among the candidates."""

    lost: Bool
    """[B]: no expert, or not one that is essential to the policy, gave a usable distribution."""

    ungated: Bool
    """[B]: the gate failed."""

    sources: Sources
    """What all this was made from."""

    table: CandidateTable
    """What each expert says of the candidates."""

    prob_space: Bool
    """[B]: fused as sum c_i p_i."""

    read: int
    """Of each list the gate reads so many, and records keep as many; without a gate all."""


class Fuser:
    """Fuses the rows of a tick, batched, one rule after another."""

    def __init__(
        self,
        experts: list[str],
        vocabulary: int,
        gate: GateRunner | None,
        missing: Literal["tail", "exact"],
        look_up: LookUp,
        clock: TickClock,
    ) -> None:
        self._experts = experts
        self._vocabulary = vocabulary
        self._gate = gate
        self._missing = missing
        self._look_up = look_up
        self.clock = clock
        self.policies = PolicyBook()

    def replace_gate(self, gate: GateRunner) -> None:
        """Ask `gate` from now on; its projected and state sizes are the old one's."""
        self._gate = gate

    def fuse(self, table: SequenceTable, slots: Int64) -> Fused:
        """Fuse the kept rows of `slots` (each complete) and advance their gate state. A row that an expert was asked
        about and did not answer is left out: it is not what its token should be fused from."""
        rows = self._read(table, slots)
        known = rows.found
        if self._missing == "exact":
            rows, known = self._look_up_missing(rows)
        values = fill_tail(known, rows.logprobs[:, :, -1], self._vocabulary)
        gated, ungated = self._run_gate(table, rows)
        chosen, prob_space, allowed = self._apply_rules(table, rows, values, gated)
        fused = combine(values, known, chosen, prob_space, allowed)
        return Fused(
            slots=rows.slots,
            ids=known.ids,
            logprobs=fused,
            coefficients=chosen,
            exact_columns=known.exact_columns,
            lost=_lost(fused, rows.available, chosen),
            ungated=ungated,
            sources=Sources(
                rows.ids, rows.logprobs, rows.expected, rows.available, rows.found, prob_space, self._vocabulary
            ),
            table=known,
            prob_space=prob_space,
            read=rows.ids.shape[2] if self._gate is None else self._gate.top_k,
        )

    def _read(self, table: SequenceTable, slots: Int64) -> _Rows:
        """The kept rows and their candidates."""
        kept = table.rows
        ids, logprobs = kept.ids[slots], kept.logprobs[slots]
        found = tabulate(ids, logprobs, table.exact.ids[slots], kept.exact[slots], self._vocabulary)
        expected = table.expected[slots]
        return _Rows(slots, ids, logprobs, expected, expected & kept.usable[slots], found)

    def _look_up_missing(self, rows: _Rows) -> tuple[_Rows, CandidateTable]:
        """Ask each available expert for the candidates that it did not list itself: the rows for which all answered,
        and what is known of their candidates then."""
        found = rows.found
        present = (found.ids >= 0)[:, None, :]
        lacking = (~found.listed & present).any(axis=2) & rows.available
        asked = {int(e): np.flatnonzero(lacking[:, e]) for e in np.flatnonzero(lacking.any(axis=0))}
        if not asked:
            return rows, found
        answers = self._ask_experts(rows, asked)
        known = _filled_in(found, asked, answers)
        if len(answers) == len(asked):
            return rows, known
        answered = np.ones(len(rows.slots), bool)
        for expert in asked.keys() - answers.keys():
            answered[asked[expert]] = False
        return rows.only(answered), known.only(answered)

    @timed(Phase.LOOK_UP)
    def _ask_experts(self, rows: _Rows, asked: dict[int, Int64]) -> dict[int, Float32]:
        """Each expert's log-probabilities [B', U] of the candidates of the B' rows that it is `asked` about."""
        wanted = {
            expert: (rows.slots[which].astype(np.int32), np.ascontiguousarray(rows.found.ids[which]))
            for expert, which in asked.items()
        }
        return self._look_up(wanted)

    def _run_gate(self, table: SequenceTable, rows: _Rows) -> tuple[Float32, Bool]:
        """The gate's coefficients [B, E] for rows whose policy asks it (elsewhere 0), and where it failed; those rows'
        gate state in the table moves on."""
        gated = np.zeros(rows.available.shape, np.float32)
        ungated = np.zeros(len(rows.slots), bool)
        if self._gate is not None:
            asked = np.flatnonzero(self.policies.gated(table.policy[rows.slots]))
            if asked.size:
                output = self._ask_gate(self._gate, table, rows, asked)
                gated[asked], ungated[asked] = output.coefficients, output.failed
        return gated, ungated

    @timed(Phase.GATE)
    def _ask_gate(self, gate: GateRunner, table: SequenceTable, rows: _Rows, asked: Int64) -> GateOutput:
        """The gate's answer for the rows `asked` [B']; their state in the table moves on."""
        slots = rows.slots[asked]
        logprobs, ids = rows.logprobs[asked, :, : gate.top_k], rows.ids[asked, :, : gate.top_k]
        output = gate(logprobs, ids, table.rows.projected[slots], table.gate_state[slots])
        table.gate_state[slots] = output.state
        return output

    def _apply_rules(
        self, table: SequenceTable, rows: _Rows, values: Float32, gated: Float32
    ) -> tuple[Float32, Bool, Bool | None]:
        """(coefficients [B, E], rows in prob space [B], allowed candidates [B, U] or None), policy by policy."""
        slots, logprobs, available = rows.slots, rows.logprobs, rows.available
        chosen = np.empty(available.shape, np.float32)
        prob_space = np.zeros(len(slots), bool)
        allowed: Bool | None = None
        numbers = table.policy[slots]
        present = self.policies.present(numbers)
        for number, policy in present:
            its = slice(None) if len(present) == 1 else np.flatnonzero(numbers == number)
            evidence = Evidence(
                logprobs[its], available[its], gated[its], table.cross_entropy[slots[its]], self._vocabulary
            )
            chosen[its] = coefficients(policy, self._experts, evidence)
            prob_space[its] = space(policy, self._gate.space if self._gate else "logprob") == "prob"
            if (mask := plausible(policy, self._experts, values[its])) is not None:
                allowed = np.ones((len(slots), values.shape[2]), bool) if allowed is None else allowed
                allowed[its] = mask
        return chosen, prob_space, allowed


@compiled
def _lost(fused: Float32, available: Bool, coefficients: Float32) -> Bool:
    """bool[B]: rows with no candidate that can be sampled, or for which no expert was available, or none counted."""
    lost = np.empty(len(fused), np.bool_)
    for row in range(len(fused)):
        lost[row] = fused[row].max() == -np.inf or not available[row].any() or not coefficients[row].any()
    return lost


def _filled_in(found: CandidateTable, asked: dict[int, Int64], answers: dict[int, Float32]) -> CandidateTable:
    """`found` with what experts answered that were `asked` about some rows."""
    logprobs, listed = found.logprobs.copy(), found.listed.copy()
    for expert, answer in answers.items():
        rows = asked[expert]
        logprobs[rows, expert] = np.where(listed[rows, expert], logprobs[rows, expert], answer)
        listed[rows, expert] |= found.ids[rows] >= 0
    return CandidateTable(found.ids, logprobs, listed, found.exact_columns)
