"""The sequences that are running, as a table of arrays: one row (slot) a sequence, one column an expert.

Everything a tick does to all sequences at once is an operation on these arrays; nothing here decides anything. Slots
are reused after `release`; a slot's number is also its name on the sockets to the experts.

Letters: S slots, E experts, K top-k, X exact ids, d projected size, T generated tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.coordinator.arrays import Bool, Float32, Int32, Int64
from server.coordinator.compiled import compiled
from server.coordinator.sampling import Penalties, Rules
from server.request import SequenceRequest

_KEPT, _MISPLACED = 1, 2


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """One expert's report as arrays: `slots`, `positions` int32[B], `ids` int32[B, K], `logprobs` float32[B, K],
    `exact` float32[B, X'], `projected` float32[B, d'] (d' is 0 or d)."""

    slots: Int32
    positions: Int32
    ids: Int32
    logprobs: Float32
    exact: Float32
    projected: Float32


class SequenceTable:
    """State of at most `slots` running sequences over `experts` experts.

    Public arrays, first axis S:
    `active`, `expected` bool[S, E] (experts whose rows this sequence needs), `placed` bool[S, E] (it is in that
    engine), `reported` bool[S, E] (a row for its current position is kept), `scored` bool[S, E] (its prompt's
    cross-entropy is known), `needs_scores` bool[S], `ids` int32[S, E, K], `logprobs` float32[S, E, K], `exact_ids`
    int32[S, X], `exact_logprobs` float32[S, E, X], `projected` float32[S, E, d], `gate_state` float32[S, state],
    `cross_entropy` float32[S, E], `prompt_lengths` int32[S, E], `generated` int32[S], `policy` int32[S], `given`
    int32[S] (tokens given rather than drawn), `forced` int32[S] (the given token at the current position, -1 without).
    """

    def __init__(self, slots: int, experts: int, top_k: int, projected: int, state: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.requests: dict[int, SequenceRequest] = {}
        self.slot_of: dict[int, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self.sequence = np.zeros(slots, np.int64)
        self.order = np.zeros(slots, np.int64)
        self.active = np.zeros(slots, bool)
        self.policy = np.zeros(slots, np.int32)
        self.generated = np.zeros(slots, np.int32)
        self.given = np.zeros(slots, np.int32)
        self.forced = np.full(slots, -1, np.int32)
        self.max_tokens = np.zeros(slots, np.int32)
        self.min_tokens = np.zeros(slots, np.int32)
        self.needs_scores = np.zeros(slots, bool)
        self.seeds = np.zeros(slots, np.uint64)
        self.temperature = np.zeros(slots, np.float32)
        self.top_p = np.ones(slots, np.float32)
        self.top_k = np.zeros(slots, np.int32)
        self.min_p = np.zeros(slots, np.float32)
        self.detailed = np.zeros(slots, bool)
        self.top_logprobs = np.zeros(slots, np.int32)
        self.recorded = np.zeros(slots, bool)
        self.expected = np.zeros((slots, experts), bool)
        self.placed = np.zeros((slots, experts), bool)
        self.reported = np.zeros((slots, experts), bool)
        self.usable = np.zeros((slots, experts), bool)
        self.scored = np.zeros((slots, experts), bool)
        self.cached = np.full((slots, experts), -1, np.int32)
        self.cross_entropy = np.zeros((slots, experts), np.float32)
        self.prompt_lengths = np.zeros((slots, experts), np.int32)
        self.ids = np.full((slots, experts, top_k), -1, np.int32)
        self.logprobs = np.full((slots, experts, top_k), -np.inf, np.float32)
        self.projected = np.zeros((slots, experts, projected), np.float32)
        self.gate_state = np.zeros((slots, state), np.float32)
        self.exact_ids = np.full((slots, 1), -1, np.int32)
        self._exact_counts = np.zeros(slots, np.int32)
        self.exact_bias = np.zeros((slots, 1), np.float32)
        self.exact_is_stop = np.zeros((slots, 1), bool)
        self.exact_logprobs = np.full((slots, experts, 1), -np.inf, np.float32)
        self._tokens = np.zeros((slots, 64), np.int32)
        self._penalties = _PenaltyTable(slots, vocabulary)

    @property
    def full(self) -> bool:
        return not self._free

    def active_slots(self) -> Int64:
        return np.flatnonzero(self.active)

    def admit(
        self, request: SequenceRequest, *, order: int, policy: int, expected: Bool, scores: bool, max_tokens: int
    ) -> int:
        """Give `request` a slot. `order`: its rank, lower is older; `policy`: a number the caller groups rows by;
        `expected` bool[E]: the experts it needs; `scores`: it also needs their cross-entropy of the prompt."""
        slot = self._free.pop()
        self.requests[slot] = request
        self.slot_of[request.id] = slot
        self.sequence[slot], self.order[slot], self.policy[slot] = request.id, order, policy
        self.active[slot] = True
        self.generated[slot] = 0
        self.given[slot] = len(request.given)
        self.max_tokens[slot], self.min_tokens[slot] = max_tokens, min(request.min_tokens, max_tokens)
        self.needs_scores[slot] = scores
        self.detailed[slot] = request.top_logprobs is not None or request.expert_weights
        self.top_logprobs[slot] = request.top_logprobs or 0
        self.recorded[slot] = request.record
        sampling = request.sampling
        self.seeds[slot] = sampling.seed
        self.temperature[slot], self.top_p[slot] = sampling.temperature, sampling.top_p
        self.top_k[slot], self.min_p[slot] = min(sampling.top_k, self._vocabulary), sampling.min_p
        self.expected[slot] = expected
        self.placed[slot] = self.reported[slot] = False
        self.prompt_lengths[slot] = [len(prompt) for prompt in request.prompts]
        # Nothing is said of a prompt's first token: vLLM's Model Runner V2 never answers for a prompt of one.
        self.scored[slot], self.cross_entropy[slot] = self.prompt_lengths[slot] <= 1, 0
        self.cached[slot] = -1
        self.gate_state[slot] = 0
        self.ids[slot], self.logprobs[slot], self.projected[slot] = -1, -np.inf, 0
        self._set_exact(slot, request)
        self._force(slot)
        self._penalties.start(slot, request)
        return slot

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`; the caller has dropped it from every engine."""
        del self.slot_of[self.requests.pop(slot).id]
        self._penalties.stop(slot)
        self.active[slot] = self.placed[slot] = self.reported[slot] = self.expected[slot] = False
        self._free.append(slot)

    def note_cached(self, sequence: int, expert: int, tokens: int) -> None:
        """Prompt tokens that an engine found in its prefix cache; only the first prefill counts."""
        slot = self.slot_of.get(sequence)
        if slot is not None and self.cached[slot, expert] < 0:
            self.cached[slot, expert] = tokens

    def cached_tokens(self, slot: int) -> int:
        """Prompt tokens that every engine found in its prefix cache."""
        known = self.cached[slot][self.cached[slot] >= 0]
        return int(known.min()) if known.size else 0

    def exact_ids_of(self, slot: int) -> list[int]:
        """The ids whose log-probability every row of this sequence carries."""
        return [int(token) for token in self.exact_ids[slot, : self._exact_counts[slot]]]

    def tokens_for(self, slot: int, expert: int) -> list[int]:
        """What the expert's engine must have seen: its prompt and all tokens generated so far."""
        generated = self._tokens[slot, : self.generated[slot]]
        return self.requests[slot].prompts[expert] + [int(token) for token in generated]

    def keep_rows(self, expert: int, rows: ExpertRows) -> tuple[Int64, Int64]:
        """Keep an expert's rows for the current positions; (slots kept, slots reported at another position).

        Rows of sequences that are no longer in that engine are left out of both.
        """
        verdicts = _keep_rows(
            expert,
            rows.slots,
            rows.positions,
            rows.ids,
            rows.logprobs,
            rows.exact,
            rows.projected,
            self.placed,
            self.prompt_lengths,
            self.generated,
            self.ids,
            self.logprobs,
            self.exact_logprobs,
            self.projected,
            self.reported,
            self.usable,
        )
        slots = rows.slots.astype(np.int64)
        if (verdicts == _KEPT).all():
            return slots, slots[:0]
        return slots[verdicts == _KEPT], slots[verdicts == _MISPLACED]

    def lose(self, expert: int, slots: Int64) -> None:
        """Go on without an expert in `slots`: forget its row and expect no more."""
        self.expected[slots, expert] = self.placed[slots, expert] = self.reported[slots, expert] = False
        self.ids[slots, expert], self.logprobs[slots, expert], self.projected[slots, expert] = -1, -np.inf, 0

    def complete(self) -> Int64:
        """Slots, oldest first, of the sequences for which every expected expert's row (and score) is there."""
        slots = _complete(self.active, self.expected, self.reported, self.needs_scores, self.scored)
        return slots if len(slots) < 2 else slots[np.argsort(self.order[slots], kind="stable")]

    def lacking(self) -> Bool:
        """bool[S, E]: sequences that an engine needs and does not have."""
        return np.asarray(self.active[:, None] & self.expected & ~self.placed & ~self.reported)

    def advance(self, slots: Int64, tokens: Int32) -> None:
        """Append one token to each of `slots`; their rows are used up."""
        if slots.size and int(self.generated[slots].max()) >= self._tokens.shape[1]:
            self._tokens = np.pad(self._tokens, ((0, 0), (0, self._tokens.shape[1])))
        self._tokens[slots, self.generated[slots]] = tokens
        drawn = self.forced[slots] < 0
        self._penalties.count(slots[drawn], tokens[drawn])
        self.generated[slots] += 1
        self.reported[slots] = False
        for slot in slots[~drawn].tolist():
            self._force(slot)

    def rules(self, slots: Int64) -> Rules:
        return Rules(self.temperature[slots], self.top_p[slots], self.top_k[slots], self.min_p[slots])

    def penalties(self, slots: Int64, candidates: Int32) -> tuple[Int64, Penalties] | None:
        """(which of the rows have penalties, theirs), None if none has. `candidates` int32[B, U]."""
        return self._penalties.look_up(slots, candidates)

    def kv_tokens(self, expert: int, block_size: int) -> int:
        """KV-cache tokens, in whole blocks, that the running sequences hold or will hold in one engine."""
        needing = self.active & self.expected[:, expert]
        lengths = self.prompt_lengths[needing, expert] + self.generated[needing] + 1
        return int((-(-lengths // block_size) * block_size).sum())

    def _set_exact(self, slot: int, request: SequenceRequest) -> None:
        bias = request.sampling.logit_bias
        stops = set(request.stop_token_ids)
        ids = sorted(stops | set(bias))
        if (missing := len(ids) + bool(request.given) - self.exact_ids.shape[1]) > 0:
            self._widen_exact(missing)
        self.exact_ids[slot], self.exact_bias[slot], self.exact_is_stop[slot] = -1, 0, False
        self.exact_ids[slot, : len(ids)] = ids
        self.exact_bias[slot, : len(ids)] = [bias.get(token, 0.0) for token in ids]
        self.exact_is_stop[slot, : len(ids)] = [token in stops for token in ids]
        self.exact_logprobs[slot] = -np.inf
        self._exact_counts[slot] = len(ids)

    def _force(self, slot: int) -> None:
        """Have the given token at the current position, if any, be one more exact id."""
        given, place = self.requests[slot].given, self.generated[slot]
        self.forced[slot] = given[place] if place < len(given) else -1
        if given:
            self.exact_ids[slot, self._exact_counts[slot]] = self.forced[slot]
        if place == len(given):  # what is drawn starts as it does after the same tokens as a prompt
            self.gate_state[slot] = 0

    def _widen_exact(self, columns: int) -> None:
        self.exact_ids = np.pad(self.exact_ids, ((0, 0), (0, columns)), constant_values=-1)
        self.exact_bias = np.pad(self.exact_bias, ((0, 0), (0, columns)))
        self.exact_is_stop = np.pad(self.exact_is_stop, ((0, 0), (0, columns)))
        self.exact_logprobs = np.pad(self.exact_logprobs, ((0, 0), (0, 0), (0, columns)), constant_values=-np.inf)


class _PenaltyTable:
    """Token counts over the vocabulary, kept only for sequences with a penalty: P of them, int32[P, V]."""

    def __init__(self, slots: int, vocabulary: int) -> None:
        self._row = np.full(slots, -1, np.int64)
        self._free: list[int] = []
        self._parameters = np.zeros((0, 3), np.float32)  # presence, frequency, repetition
        self._output_counts = np.zeros((0, vocabulary), np.int32)
        self._in_prompt = np.zeros((0, vocabulary), bool)

    def start(self, slot: int, request: SequenceRequest) -> None:
        sampling = request.sampling
        parameters = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
        if parameters == (0.0, 0.0, 1.0):
            return
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._row[slot] = row
        self._parameters[row] = parameters
        self._output_counts[row] = 0
        self._in_prompt[row] = False
        for prompt in request.prompts:
            self._in_prompt[row, prompt] = True
        self._in_prompt[row, request.given] = True

    def stop(self, slot: int) -> None:
        if self._row[slot] >= 0:
            self._free.append(int(self._row[slot]))
            self._row[slot] = -1

    def count(self, slots: Int64, tokens: Int32) -> None:
        rows = self._row[slots]
        counted = rows >= 0
        if counted.any():
            self._output_counts[rows[counted], tokens[counted]] += 1

    def look_up(self, slots: Int64, candidates: Int32) -> tuple[Int64, Penalties] | None:
        rows = self._row[slots]
        having = np.flatnonzero(rows >= 0)
        if not having.size:
            return None
        rows, ids = rows[having], np.maximum(candidates[having], 0)
        counts = self._output_counts[rows[:, None], ids]
        seen = (counts > 0) | self._in_prompt[rows[:, None], ids]
        presence, frequency, repetition = self._parameters[rows].T
        return having, Penalties(presence, frequency, repetition, counts, seen)

    def _grow(self) -> None:
        old = len(self._parameters)
        new = max(4, old)
        self._parameters = np.pad(self._parameters, ((0, new), (0, 0)))
        self._output_counts = np.pad(self._output_counts, ((0, new), (0, 0)))
        self._in_prompt = np.pad(self._in_prompt, ((0, new), (0, 0)))
        self._free.extend(range(old, old + new))


@compiled
def _keep_rows(
    expert: int,
    slots: Int32,
    positions: Int32,
    ids: Int32,
    logprobs: Float32,
    exact: Float32,
    projected: Float32,
    placed: Bool,
    prompt_lengths: Int32,
    generated: Int32,
    table_ids: Int32,
    table_logprobs: Float32,
    table_exact: Float32,
    table_projected: Float32,
    reported: Bool,
    usable: Bool,
) -> npt.NDArray[np.int8]:
    """A verdict int8[B] for each row; kept rows are copied into the table."""
    verdicts = np.zeros(len(slots), np.int8)
    for row in range(len(slots)):
        slot = slots[row]
        if not placed[slot, expert]:
            continue
        if positions[row] != prompt_lengths[slot, expert] + generated[slot]:
            verdicts[row] = _MISPLACED
            continue
        verdicts[row] = _KEPT
        table_ids[slot, expert, : ids.shape[1]] = ids[row]
        table_logprobs[slot, expert, : ids.shape[1]] = logprobs[row]
        table_exact[slot, expert, : exact.shape[1]] = exact[row]
        table_projected[slot, expert, : projected.shape[1]] = projected[row]
        reported[slot, expert] = True
        usable[slot, expert] = ids.shape[1] > 0 and logprobs[row, 0] > -np.inf and not np.isnan(logprobs[row]).any()
    return verdicts


@compiled
def _complete(active: Bool, expected: Bool, reported: Bool, needs_scores: Bool, scored: Bool) -> Int64:
    """Slots whose every expected expert has reported, and been scored where that is needed."""
    slots = np.empty(len(active), np.int64)
    count = 0
    for slot in range(len(active)):
        if not active[slot]:
            continue
        awaited = ready = 0
        for expert in range(expected.shape[1]):
            if expected[slot, expert]:
                awaited += 1
                ready += reported[slot, expert] and (scored[slot, expert] or not needs_scores[slot])
        if awaited and ready == awaited:
            slots[count] = slot
            count += 1
    return slots[:count]
