"""coordinator <-> expert: rows out, tokens in, one message each way a tick."""

from __future__ import annotations

import msgspec

from server.wire.base import Message, Stop


class Bare(Message, frozen=True, tag="Bare"):
    """Benchmark: decode made-up prompts greedily, without any rendezvous."""

    sequences: int
    """How many at once."""
    prompt_tokens: int
    """Length of each prompt."""
    tokens: int
    """Decoded of each."""


class Add(Message, frozen=True, tag="Add"):
    """Put a sequence into the engine before its next step."""

    slot: int
    """Names the sequence on this socket while it is there."""
    sequence: int
    """Its number, which no other ever has."""
    tokens: list[int]
    """Its prompt and the tokens generated so far; its first row is for position len(tokens)."""
    priority: int
    """Lower runs earlier."""
    exact_ids: list[int] = msgspec.field(default_factory=list)
    """Ids whose log-probability every row must carry."""
    temperature: float = 1.0
    """Divides this expert's logits."""
    score: bool = False
    """Also answer with `Scored` for the tokens themselves."""
    grammar: str | None = None
    """Masks the logits of every row, in llguidance's words. An engine that cannot follow it answers with `Refused`."""
    entropy: bool = False
    """Every row also carries this expert's entropy."""
    generated: int = 0
    """So many of the tokens, the last, are already part of what the grammar describes."""
    given: list[int] = msgspec.field(default_factory=list)
    """The tokens that will follow; a row's own is one more of its exact ids, the last."""


class Tick(Message, frozen=True, tag="Tick"):
    """End the step with these tokens, then drop and park, then add, then run the next one."""

    number: int
    """Of the next step; its `Report` has it."""
    tokens: bytes
    """int32[B], for the rows of the last `Report`, in its order. A row that nothing was decided for gets any valid
    token: its slot is dropped or parked."""
    drop: list[int]
    """Slots whose sequences leave the engine."""
    park: list[int]
    """Slots whose sequences leave it too, but may still be asked for by `GetRows` until they are added or dropped."""
    add: list[Add]
    """Sequences that enter it."""


class GetRows(Message, frozen=True, tag="GetRows"):
    """Ask for whole rows. Answered by `WholeRows`."""

    number: int
    """Comes back in the answer, so that a late one is not taken for another's."""
    slots: bytes
    """int32[B]: the sequences, of whose last rows."""
    memory: str
    """Where to write them, a `server.wire.shared_rows.RowMemory`; "" for an expert on another host."""


class Ready(Message, frozen=True, tag="Ready"):
    """The engine is loaded."""

    kv_tokens: int
    """KV-cache capacity in tokens."""
    block_size: int
    """Tokens in a block of the KV cache."""
    max_model_len: int
    """The longest sequence, prompt included."""
    vocab_size: int
    """V, the width of its logits."""
    hidden_size: int
    """H, the width of its hidden states."""
    version: str
    """The engine's."""


class Load(Message, frozen=True, tag="Load"):
    """How busy an engine is. Part of every `Report`; sent by itself when the engine falls empty."""

    kv_used: float
    """Part of the KV cache in use, in [0, 1]."""
    running: int
    """Sequences in it."""
    preemptions: int
    """Since start."""


class Report(Message, frozen=True, tag="Report"):
    """The rows of one step: of sequences whose next token is to be sampled."""

    number: int
    """Of the step: that of the `Tick` before it."""
    slots: bytes
    """int32[B]: the sequences."""
    positions: bytes
    """int32[B]: index of the token to be sampled, prompt included."""
    ids: bytes
    """int32[B, K]: the most probable tokens, best first."""
    logprobs: bytes
    """float32[B, K]: theirs, normalised over the whole vocabulary."""
    exact: bytes
    """float32[B, X]: log-probabilities of each slot's own exact ids; -inf past its own. "" without any."""
    entropies: bytes
    """float32[B]: of the rows, in nats, for sequences that were added with `entropy`; "" without any."""
    projected: bytes
    """float32[B, d]: what the gate's projection makes of the hidden states; "" without one."""
    step_seconds: float
    """From the start of the step to this report."""
    load: Load
    """How busy the engine is."""
    cached_tokens: dict[int, int]
    """Sequence -> prompt tokens found in the prefix cache, for prefills that this step completes."""


class WholeRows(Message, frozen=True, tag="WholeRows"):
    """Answer to `GetRows`."""

    number: int
    """That of the question."""
    logprobs: bytes | None
    """float32[B, V], normalised over the whole vocabulary; -inf for rows that are not there any more. None: they were
    written to the memory that the question named."""


class Scored(Message, frozen=True, tag="Scored"):
    """A prompt was scored."""

    sequence: int
    """Whose."""
    logprobs: bytes
    """float32[len(tokens) - 1]: log-probability of each token but the first under this expert."""


class Refused(Message, frozen=True, tag="Refused"):
    """The engine cannot follow a sequence's grammar. The sequence shows no more rows, and waits to be dropped."""

    sequence: int
    """Its number."""
    message: str
    """Why, in one line."""


class BareDone(Message, frozen=True, tag="BareDone"):
    """Answer to `Bare`."""

    step_seconds: list[float]
    """Duration of each decoding step."""


ToExpert = Tick | GetRows | Bare | Stop
FromExpert = Ready | Report | Load | WholeRows | Scored | Refused | BareDone
