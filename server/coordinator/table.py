"""The sequences that are running, as a table of arrays: one row (slot) a sequence, one column an expert.

Everything a tick does to all sequences at once is an operation on these arrays; nothing here decides anything. Slots
are reused after `release`; a slot's number is also its name on the sockets to the experts.

Letters: S slots, E experts, K top-k, X exact ids, d projected size, T generated tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from server.coordinator.arrays import Bool, Float32, Int32, Int64, UInt64
from server.coordinator.compiled import compiled
from server.coordinator.penalties import PenaltyTable
from server.coordinator.rows import ExpertRows, KeptRows, Lengths, complete, keep_rows
from server.coordinator.sampling import SMALLEST, Penalties, Rules
from server.request import SequenceRequest


class ExactIds(NamedTuple):
    """Tokens whose log-probability every row of a sequence carries: stop tokens, biased ones, and last a given one."""

    ids: Int32
    """[S, X]: the tokens, then -1."""

    bias: Float32
    """[S, X]: what is added to the score of each."""

    is_stop: Bool
    """[S, X]: which of them end the sequence."""

    counts: Int32
    """[S]: how many a sequence has, but for the given one."""


class SequenceTable:
    """State of at most `slots` running sequences over `experts` experts."""

    vocabulary: int
    """V."""

    requests: dict[int, SequenceRequest]
    """slot -> what runs in it."""

    slot_of: dict[int, int]
    """sequence -> its slot."""

    sequence: Int64
    """[S]: the number of the sequence."""

    order: Int64
    """[S]: its rank, lower is older."""

    active: Bool
    """[S]: a sequence runs in this slot."""

    policy: Int32
    """[S]: the policy's number in the `PolicyBook`."""

    expected: Bool
    """[S, E]: experts whose rows the sequence needs."""

    placed: Bool
    """[S, E]: it is in that engine."""

    rows: KeptRows
    """What the experts reported."""

    exact: ExactIds
    """The tokens whose log-probability is asked for."""

    lengths: Lengths
    """Lengths of prompts and of what is generated."""

    forced: Int32
    """[S]: the given token at the current position, -1 without."""

    last_tokens: Int32
    """[S]: the token generated last; it outlives the sequence, until the next one in its slot has a token."""

    rules: Rules
    """[S]: how to sample."""

    seeds: UInt64
    """[S]: the stream of random numbers to sample by."""

    detailed: Bool
    """[S]: more is asked for than the tokens: log-probabilities or the experts' weights."""

    top_logprobs: Int32
    """[S]: alternatives whose log-probabilities are asked for beside each token's, -1 where not even that is."""

    recorded: Bool
    """[S]: the experts' rows are asked for."""

    gate_state: Float32
    """[S, state]: what the gate carries from token to token."""

    needs_scores: Bool
    """[S]: the policy needs the cross-entropy of the prompt under each expert."""

    scored: Bool
    """[S, E]: it is known."""

    cross_entropy: Float32
    """[S, E]: nats per prompt token."""

    cached: Int32
    """[S, E]: prompt tokens that the engine found in its prefix cache, -1 while it is not known."""

    def __init__(self, slots: int, experts: int, top_k: int, projected: int, state: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._free = list(range(slots - 1, -1, -1))
        self._tokens = np.zeros((slots, 64), np.int32)
        self._penalties = PenaltyTable(slots, vocabulary)
        self.requests = {}
        self.slot_of = {}
        self.sequence, self.order = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self.active = np.zeros(slots, bool)
        self.policy = np.zeros(slots, np.int32)
        self.expected, self.placed = np.zeros((slots, experts), bool), np.zeros((slots, experts), bool)
        self.rows = KeptRows(
            ids=np.full((slots, experts, top_k), -1, np.int32),
            logprobs=np.full((slots, experts, top_k), -np.inf, np.float32),
            exact=np.full((slots, experts, 1), -np.inf, np.float32),
            entropies=np.zeros((slots, experts), np.float32),
            projected=np.zeros((slots, experts, projected), np.float32),
            reported=np.zeros((slots, experts), bool),
            usable=np.zeros((slots, experts), bool),
        )
        self.exact = ExactIds(
            ids=np.full((slots, 1), -1, np.int32),
            bias=np.zeros((slots, 1), np.float32),
            is_stop=np.zeros((slots, 1), bool),
            counts=np.zeros(slots, np.int32),
        )
        self.lengths = Lengths(
            prompt=np.zeros((slots, experts), np.int32),
            generated=np.zeros(slots, np.int32),
            given=np.zeros(slots, np.int32),
            min_tokens=np.zeros(slots, np.int32),
            max_tokens=np.zeros(slots, np.int32),
        )
        self.forced, self.last_tokens = np.full(slots, -1, np.int32), np.zeros(slots, np.int32)
        self.rules = Rules(
            temperature=np.zeros(slots, np.float32),
            top_p=np.ones(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
            min_p=np.zeros(slots, np.float32),
        )
        self.seeds = np.zeros(slots, np.uint64)
        self.detailed, self.recorded = np.zeros(slots, bool), np.zeros(slots, bool)
        self.top_logprobs = np.full(slots, -1, np.int32)
        self.gate_state = np.zeros((slots, state), np.float32)
        self.needs_scores, self.scored = np.zeros(slots, bool), np.zeros((slots, experts), bool)
        self.cross_entropy = np.zeros((slots, experts), np.float32)
        self.cached = np.full((slots, experts), -1, np.int32)

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
        self.expected[slot], self.placed[slot] = expected, False
        self._empty_rows(slot, slice(None))
        self._set_lengths(slot, request, max_tokens)
        self._set_sampling(slot, request)
        self.detailed[slot] = request.top_logprobs is not None or request.expert_weights
        self.top_logprobs[slot] = -1 if request.top_logprobs is None else request.top_logprobs
        self.recorded[slot] = request.record
        self.gate_state[slot] = 0
        self.needs_scores[slot] = scores
        # Nothing is said of a prompt's first token: vLLM's Model Runner V2 never answers for a prompt of one.
        self.scored[slot], self.cross_entropy[slot] = self.lengths.prompt[slot] <= 1, 0
        self.cached[slot] = -1
        self._set_exact(slot, request)
        self._force(slot)
        self._penalties.start(slot, request)
        return slot

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`; the caller has dropped it from every engine."""
        del self.slot_of[self.requests.pop(slot).id]
        self._penalties.stop(slot)
        self.active[slot] = self.placed[slot] = self.rows.reported[slot] = self.expected[slot] = False
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
        return [int(token) for token in self.exact.ids[slot, : self.exact.counts[slot]]]

    def tokens_for(self, slot: int, expert: int) -> list[int]:
        """What the expert's engine must have seen: its prompt and all tokens generated so far."""
        generated = self._tokens[slot, : self.lengths.generated[slot]]
        return self.requests[slot].prompts[expert] + [int(token) for token in generated]

    def keep_rows(self, expert: int, rows: ExpertRows) -> tuple[Int64, Int64]:
        """Keep an expert's rows for the current positions; (slots kept, slots reported at another position).

        Rows of sequences that are no longer in that engine are left out of both.
        """
        return keep_rows(expert, rows, self.placed, self.lengths, self.rows)

    def lose(self, expert: int, slots: Int64) -> None:
        """Go on without an expert in `slots`: forget its row and expect no more."""
        self.expected[slots, expert] = self.placed[slots, expert] = False
        self._empty_rows(slots, expert)

    def complete(self) -> Int64:
        """Slots, oldest first, of the sequences for which every expected expert's row (and score) is there."""
        slots = complete(self.active, self.expected, self.rows.reported, self.needs_scores, self.scored)
        return slots if len(slots) < 2 else slots[np.argsort(self.order[slots], kind="stable")]

    def lacking(self) -> Bool:
        """bool[S, E]: sequences that an engine needs and does not have."""
        return np.asarray(self.active[:, None] & self.expected & ~self.placed & ~self.rows.reported)

    def advance(self, slots: Int64, tokens: Int32) -> None:
        """Append one token to each of `slots`; their rows are used up."""
        if slots.size and int(self.lengths.generated[slots].max()) >= self._tokens.shape[1]:
            self._tokens = np.pad(self._tokens, ((0, 0), (0, self._tokens.shape[1])))
        _append(slots, tokens, self._tokens, self.last_tokens, self.lengths.generated, self.rows.reported)
        sampled = self.forced[slots] < 0
        if sampled.all():
            self._penalties.count(slots, tokens)
            return
        self._penalties.count(slots[sampled], tokens[sampled])
        for slot in slots[~sampled].tolist():
            self._force(slot)

    def penalties(self, slots: Int64, candidates: Int32) -> tuple[Int64, Penalties] | None:
        """(which of the rows have penalties, theirs), None if none has. `candidates` int32[B, U]."""
        return self._penalties.look_up(slots, candidates)

    def penalties_of(self, slot: int) -> Penalties | None:
        """Those of one sequence over the whole vocabulary, None if it has none."""
        return self._penalties.of(slot)

    def kv_tokens(self, expert: int, block_size: int) -> int:
        """KV-cache tokens, in whole blocks, that the running sequences hold or will hold in one engine."""
        needing = self.active & self.expected[:, expert]
        lengths = self.lengths.prompt[needing, expert] + self.lengths.generated[needing] + 1
        return int((-(-lengths // block_size) * block_size).sum())

    def _empty_rows(self, slots: int | Int64, experts: int | slice) -> None:
        """Keep nothing of what `experts` reported of `slots`."""
        rows = self.rows
        rows.ids[slots, experts], rows.logprobs[slots, experts], rows.exact[slots, experts] = -1, -np.inf, -np.inf
        rows.projected[slots, experts], rows.reported[slots, experts] = 0, False

    def _set_lengths(self, slot: int, request: SequenceRequest, max_tokens: int) -> None:
        lengths = self.lengths
        lengths.prompt[slot] = [len(prompt) for prompt in request.prompts]
        lengths.generated[slot], lengths.given[slot] = 0, len(request.given)
        lengths.max_tokens[slot], lengths.min_tokens[slot] = max_tokens, min(request.min_tokens, max_tokens)

    def _set_sampling(self, slot: int, request: SequenceRequest) -> None:
        rules, sampling = self.rules, request.sampling
        self.seeds[slot] = sampling.seed
        rules.temperature[slot] = max(sampling.temperature, SMALLEST) if sampling.temperature > 0 else 0
        rules.top_p[slot] = max(sampling.top_p, SMALLEST)
        rules.top_k[slot], rules.min_p[slot] = min(sampling.top_k, self.vocabulary), sampling.min_p

    def _set_exact(self, slot: int, request: SequenceRequest) -> None:
        bias = request.sampling.logit_bias
        stops = set(request.stop_token_ids)
        tokens = sorted(stops | set(bias))
        if (missing := len(tokens) + bool(request.given) - self.exact.ids.shape[1]) > 0:
            self._widen_exact(missing)
        exact, count = self.exact, len(tokens)
        exact.ids[slot], exact.bias[slot], exact.is_stop[slot] = -1, 0, False
        exact.ids[slot, :count] = tokens
        exact.bias[slot, :count] = [bias.get(token, 0.0) for token in tokens]
        exact.is_stop[slot, :count] = [token in stops for token in tokens]
        exact.counts[slot] = count

    def _force(self, slot: int) -> None:
        """Have the given token at the current position, if any, be one more exact id."""
        given, place = self.requests[slot].given, self.lengths.generated[slot]
        self.forced[slot] = given[place] if place < len(given) else -1
        if given:
            self.exact.ids[slot, self.exact.counts[slot]] = self.forced[slot]
        if place == len(given):  # what is sampled starts as it does after the same tokens as a prompt
            self.gate_state[slot] = 0

    def _widen_exact(self, columns: int) -> None:
        wider, exact, rows = ((0, 0), (0, columns)), self.exact, self.rows
        self.exact = exact._replace(
            ids=np.pad(exact.ids, wider, constant_values=-1),
            bias=np.pad(exact.bias, wider),
            is_stop=np.pad(exact.is_stop, wider),
        )
        self.rows = rows._replace(exact=np.pad(rows.exact, ((0, 0), *wider), constant_values=-np.inf))


@compiled
def _append(
    slots: Int64, tokens: Int32, all_tokens: Int32, last_tokens: Int32, generated: Int32, reported: Bool
) -> None:
    """Write one token for each of `slots` into `all_tokens` [S, T] and `last_tokens` [S]; no row is for the position
    that follows."""
    for row in range(len(slots)):
        slot = slots[row]
        all_tokens[slot, generated[slot]] = last_tokens[slot] = tokens[row]
        generated[slot] += 1
        reported[slot] = False
