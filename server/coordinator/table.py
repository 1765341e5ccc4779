"""The sequences that are running, as a table of arrays: one row (slot) a sequence, one column an expert.

Everything a tick does to all sequences at once is an operation on these arrays; nothing here decides anything. Slots
are reused after `release`; a slot's number is also its name on the sockets to the experts.

Letters: S slots, E experts, K top-k, X exact ids, d projected size, T generated tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from server.coordinator.fusion import Bool, Float32, Int32, Int64
from server.coordinator.sampling import Penalties, Rules, UInt64
from server.request import SequenceRequest


class SequenceTable:
    """State of at most `slots` running sequences over `experts` experts.

    Public arrays, first axis S:
    `active`, `expected` bool[S, E] (experts whose rows this sequence needs), `placed` bool[S, E] (it is in that
    engine), `reported` bool[S, E] (a row for its current position is kept), `scored` bool[S, E] (its prompt's
    cross-entropy is known), `needs_scores` bool[S], `ids` int32[S, E, K], `logprobs` float32[S, E, K], `exact_ids`
    int32[S, X], `exact_logprobs` float32[S, E, X], `projected` float32[S, E, d], `gate_state` float32[S, state],
    `cross_entropy` float32[S, E], `prompt_lengths` int32[S, E], `generated` int32[S], `policy` int32[S].
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

    def admit(self, request: SequenceRequest, *, order: int, policy: int, expected: Bool, scores: bool) -> int:
        """Give `request` a slot. `order`: its rank, lower is older; `policy`: a number the caller groups rows by."""
        slot = self._free.pop()
        self.requests[slot] = request
        self.slot_of[request.id] = slot
        self.sequence[slot], self.order[slot], self.policy[slot] = request.id, order, policy
        self.active[slot] = True
        self.generated[slot] = 0
        self.max_tokens[slot], self.min_tokens[slot] = request.max_tokens, request.min_tokens
        self.needs_scores[slot] = scores
        self.detailed[slot] = request.top_logprobs is not None or request.expert_weights
        self.top_logprobs[slot] = request.top_logprobs or 0
        sampling = request.sampling
        self.seeds[slot] = sampling.seed
        self.temperature[slot], self.top_p[slot] = sampling.temperature, sampling.top_p
        self.top_k[slot], self.min_p[slot] = sampling.top_k, sampling.min_p
        self.expected[slot] = expected
        self.placed[slot] = self.reported[slot] = self.scored[slot] = False
        self.prompt_lengths[slot] = [len(prompt) for prompt in request.prompts]
        self.cached[slot] = -1
        self.gate_state[slot] = 0
        self.ids[slot], self.logprobs[slot], self.projected[slot] = -1, -np.inf, 0
        self._set_exact(slot, request)
        self._penalties.start(slot, request)
        return slot

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`; the caller has dropped it from every engine."""
        del self.slot_of[self.requests.pop(slot).id]
        self._penalties.stop(slot)
        self.active[slot] = self.placed[slot] = self.reported[slot] = self.expected[slot] = False
        self._free.append(slot)

    def exact_ids_of(self, slot: int) -> list[int]:
        """The ids whose log-probability every row of this sequence carries."""
        row = self.exact_ids[slot]
        return [int(token) for token in row[row >= 0]]

    def tokens_for(self, slot: int, expert: int) -> list[int]:
        """What the expert's engine must have seen: its prompt and all tokens generated so far."""
        generated = self._tokens[slot, : self.generated[slot]]
        return self.requests[slot].prompts[expert] + [int(token) for token in generated]

    def keep_rows(
        self, expert: int, slots: Int64, ids: Int32, logprobs: Float32, exact: Float32, projected: Float32
    ) -> None:
        """Keep an expert's rows for the current positions of `slots` [B]."""
        self.ids[slots, expert, : ids.shape[1]] = ids
        self.logprobs[slots, expert, : ids.shape[1]] = logprobs
        self.exact_logprobs[slots, expert, : exact.shape[1]] = exact
        if projected.size:
            self.projected[slots, expert] = projected
        self.reported[slots, expert] = True
        self.usable[slots, expert] = (logprobs[:, :1] > -np.inf).all(axis=1) & ~np.isnan(logprobs).any(axis=1)

    def lose(self, expert: int, slots: Int64) -> None:
        """Go on without an expert in `slots`: forget its row and expect no more."""
        self.expected[slots, expert] = self.placed[slots, expert] = self.reported[slots, expert] = False
        self.ids[slots, expert], self.logprobs[slots, expert] = -1, -np.inf

    def complete(self) -> Int64:
        """Slots, oldest first, of the sequences for which every expected expert's row is there."""
        ready = self.active & (self.reported | ~self.expected).all(axis=1) & self.expected.any(axis=1)
        if self.needs_scores.any():
            ready &= ~self.needs_scores | (self.scored | ~self.expected).all(axis=1)
        slots = np.flatnonzero(ready)
        return slots[np.argsort(self.order[slots], kind="stable")]

    def advance(self, slots: Int64, tokens: Int32) -> None:
        """Append one token to each of `slots`; their rows are used up."""
        if slots.size and int(self.generated[slots].max()) >= self._tokens.shape[1]:
            self._tokens = np.pad(self._tokens, ((0, 0), (0, self._tokens.shape[1])))
        self._tokens[slots, self.generated[slots]] = tokens
        self._penalties.count(slots, tokens)
        self.generated[slots] += 1
        self.reported[slots] = False

    def rules(self, slots: Int64) -> Rules:
        return Rules(self.temperature[slots], self.top_p[slots], self.top_k[slots], self.min_p[slots])

    def penalties(self, slots: Int64, candidates: Int32) -> tuple[Int64, Penalties] | None:
        """(which of the rows have penalties, theirs), None if none has. `candidates` int32[B, U]."""
        return self._penalties.look_up(slots, candidates)

    def seeds_of(self, slots: Int64) -> UInt64:
        return self.seeds[slots]

    def kv_tokens(self, expert: int, block_size: int) -> int:
        """KV-cache tokens, in whole blocks, that the running sequences hold or will hold in one engine."""
        needing = self.active & self.expected[:, expert]
        lengths = self.prompt_lengths[needing, expert] + self.generated[needing] + 1
        return int((-(-lengths // block_size) * block_size).sum())

    def _set_exact(self, slot: int, request: SequenceRequest) -> None:
        bias = request.sampling.logit_bias
        stops = set(request.stop_token_ids)
        ids = sorted(stops | set(bias))
        if (missing := len(ids) - self.exact_ids.shape[1]) > 0:
            self._widen_exact(missing)
        self.exact_ids[slot], self.exact_bias[slot], self.exact_is_stop[slot] = -1, 0, False
        self.exact_ids[slot, : len(ids)] = ids
        self.exact_bias[slot, : len(ids)] = [bias.get(token, 0.0) for token in ids]
        self.exact_is_stop[slot, : len(ids)] = [token in stops for token in ids]
        self.exact_logprobs[slot] = -np.inf

    def _widen_exact(self, columns: int) -> None:
        self.exact_ids = np.pad(self.exact_ids, ((0, 0), (0, columns)), constant_values=-1)
        self.exact_bias = np.pad(self.exact_bias, ((0, 0), (0, columns)))
        self.exact_is_stop = np.pad(self.exact_is_stop, ((0, 0), (0, columns)))
        self.exact_logprobs = np.pad(
            self.exact_logprobs, ((0, 0), (0, 0), (0, columns)), constant_values=-np.inf
        )


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


