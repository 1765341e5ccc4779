"""From kept rows to what they say of the fused distributions: candidates, the gate, each policy's rule, bounds; and to
the distributions themselves, for rows that the experts must be asked for whole.

The only place where the pure arithmetic of `bounds`, `fusion` and `coefficients` meets the sequence table, the gate and
the experts. Letters: B rows, E experts, K listed ids, X exact ids, U candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.bounds import Bounds, Rule, bound
from server.coordinator.clock import Phase, TickClock, timed
from server.coordinator.coefficients import Evidence, coefficients, plausibility, space
from server.coordinator.compiled import compiled
from server.coordinator.fusion import CandidateTable, Room, fuse_whole, tabulate
from server.coordinator.gate_runner import GateOutput, GateRunner
from server.coordinator.policy_book import PolicyBook
from server.coordinator.table import SequenceTable

GetWhole = Callable[[dict[int, Int32]], dict[int, Float32]]
"""expert -> slots int32[B] in, expert -> log-probabilities float32[B, V] out, to be used before the next call. Experts
that do not answer are left out."""


@dataclass(frozen=True, slots=True)
class Fused:
    """What lists say of the fused distributions of B sequences."""

    slots: Int64
    """[B]: theirs."""

    ids: Int32
    """[B, E, K]: the experts' lists, best first; -1 where an expert is not available."""

    logprobs: Float32
    """[B, E, K]: of `ids`; -inf where an expert is not available."""

    expected: Bool
    """[B, E]: the experts that the policy asks."""

    available: Bool
    """[B, E]: those of them whose row is usable."""

    table: CandidateTable
    """The candidates."""

    rule: Rule
    """How they are fused."""

    bounds: Bounds
    """Bounds on their scores, and on everything else."""

    ungated: Bool
    """[B]: the gate failed."""

    gate_state: Float32
    """[B, state]: what the gate carries on, once the tokens are settled."""

    read: int
    """Of each list the gate reads so many, and records keep as many; without a gate all."""

    def only(self, rows: Bool) -> Fused:
        """Those of the `rows` bool[B]."""
        return Fused(
            self.slots[rows],
            self.ids[rows],
            self.logprobs[rows],
            self.expected[rows],
            self.available[rows],
            self.table.only(rows),
            self.rule.only(rows),
            self.bounds.only(rows),
            self.ungated[rows],
            self.gate_state[rows],
            self.read,
        )


@dataclass(frozen=True, slots=True)
class WholeRow:
    """What the experts that were asked say of one sequence, over the whole vocabulary, and how it is fused."""

    experts: dict[int, Float32]
    """expert -> its log-probabilities [V]; to be used before the next are asked for."""

    weights: dict[int, float]
    """expert -> its coefficient, of those that count."""

    prob_space: bool
    """As in `Rule`."""

    leader: int
    """As in `Rule`."""

    plausibility: float
    """As in `Rule`."""

    @classmethod
    def of(cls, rule: Rule, row: int, experts: dict[int, Float32]) -> Self:
        """The `row` of `rule`, as `experts` show it."""
        coefficients = rule.coefficients[row]
        weights = {expert: float(coefficients[expert]) for expert in experts if coefficients[expert]}
        space, leader, plausibility = rule.prob_space[row], rule.leader[row], rule.plausibility[row]
        return cls(experts, weights, bool(space), int(leader), float(plausibility))

    def fuse(self, room: Room) -> Float32:
        """Scores [V] in `room`, not normalised; -inf for what cannot be sampled."""
        rows = [self.experts[expert] for expert in self.weights]
        scores = fuse_whole(rows, list(self.weights.values()), prob_space=self.prob_space, room=room)
        if self.leader >= 0:
            leader = self.experts[self.leader]
            scores[leader < leader.max() + np.float32(self.plausibility)] = -np.inf
        return scores


class Fuser:
    """Fuses the rows of a tick, batched, one rule after another."""

    def __init__(
        self, experts: list[str], vocabulary: int, gate: GateRunner | None, get_whole: GetWhole, clock: TickClock
    ) -> None:
        self._experts = experts
        self._vocabulary = vocabulary
        self._gate = gate
        self._get_whole = get_whole
        self.clock = clock
        self.policies = PolicyBook()

    def replace_gate(self, gate: GateRunner) -> None:
        """Ask `gate` from now on; its projected and state sizes are the old one's."""
        self._gate = gate

    def fuse(self, table: SequenceTable, slots: Int64) -> Fused:
        """What the kept rows of `slots` (each complete) say."""
        kept = table.rows
        ids, logprobs = kept.ids[slots], kept.logprobs[slots]
        found = tabulate(ids, logprobs, table.exact.ids[slots], kept.exact[slots], self._vocabulary)
        expected = table.expected[slots]
        available = expected & kept.usable[slots]
        gate = self._run_gate(table, slots, ids, logprobs)
        evidence = Evidence(
            available, logprobs[:, :, 0], kept.entropies[slots], gate.coefficients, table.cross_entropy[slots]
        )
        rule = self._rule(table.policy[slots], evidence)
        bounds = bound(found, logprobs[:, :, -1], rule, self._vocabulary)
        read = ids.shape[2] if self._gate is None else self._gate.top_k
        return Fused(slots, ids, logprobs, expected, available, found, rule, bounds, gate.failed, gate.state, read)

    def _run_gate(self, table: SequenceTable, slots: Int64, ids: Int32, logprobs: Float32) -> GateOutput:
        """The gate's answer for rows whose policy asks it; elsewhere coefficients of 0 and the state as it is."""
        found = GateOutput(np.zeros(ids.shape[:2], np.float32), table.gate_state[slots], np.zeros(len(slots), bool))
        if self._gate is not None:
            asked = np.flatnonzero(self.policies.gated(table.policy[slots]))
            if asked.size:
                output = self._ask_gate(self._gate, table, slots[asked], ids[asked], logprobs[asked])
                found.coefficients[asked], found.failed[asked] = output.coefficients, output.failed
                found.state[asked] = output.state
        return found

    @timed(Phase.GATE)
    def _ask_gate(
        self, gate: GateRunner, table: SequenceTable, slots: Int64, ids: Int32, logprobs: Float32
    ) -> GateOutput:
        """The gate's answer for the rows of `slots` [B']."""
        logprobs, ids = logprobs[:, :, : gate.top_k], ids[:, :, : gate.top_k]
        return gate(logprobs, ids, table.rows.projected[slots], table.gate_state[slots])

    def _rule(self, numbers: Int32, evidence: Evidence) -> Rule:
        """How rows of the policies `numbers` [B] are fused, policy by policy."""
        chosen = np.empty(evidence.available.shape, np.float32)
        prob_space = np.zeros(len(numbers), bool)
        leader, share = np.full(len(numbers), -1, np.int64), np.zeros(len(numbers), np.float32)
        present = self.policies.present(numbers)
        for number, policy in present:
            its = slice(None) if len(present) == 1 else np.flatnonzero(numbers == number)
            chosen[its] = coefficients(policy, self._experts, evidence.only(its))
            prob_space[its] = space(policy, self._gate.space if self._gate else "logprob") == "prob"
            leader[its], share[its] = plausibility(policy, self._experts)
        return Rule(chosen, prob_space, leader, share)

    # --- whole rows ---

    @timed(Phase.LOOK_UP)
    def whole_rows(self, fused: Fused, rows: Int64, recorded: Bool) -> dict[int, WholeRow]:
        """Row -> what the experts that count say of it whole, for `rows` of `fused`, all asked for in one round; those
        for which an expert did not answer are left out. `recorded` bool[B]: experts that do not count are asked too."""
        needed = fused.available & ((fused.rule.coefficients != 0) | recorded[:, None])
        asked = {expert: rows[needed[rows, expert]] for expert in range(len(self._experts))}
        asked = {expert: which for expert, which in asked.items() if which.size}
        answers = self._get_whole({expert: fused.slots[which].astype(np.int32) for expert, which in asked.items()})
        said: dict[int, dict[int, Float32]] = {row: {} for row in rows.tolist()}
        for expert, answer in answers.items():
            for row, logprobs in zip(asked[expert].tolist(), answer, strict=True):
                said[row][expert] = logprobs
        return {
            row: WholeRow.of(fused.rule, row, experts)
            for row, experts in said.items()
            if len(experts) == needed[row].sum()
        }


@compiled
def hopeless(bounds: Bounds, available: Bool, coefficients: Float32) -> Bool:
    """bool[B]: rows for which no expert was available, or none counted, or no token is possible."""
    lost = np.empty(len(available), np.bool_)
    for row in range(len(available)):
        impossible = bounds.upper[row].max() == -np.inf and bounds.highest[row] == -np.inf
        lost[row] = impossible or not available[row].any() or not coefficients[row].any()
    return lost
