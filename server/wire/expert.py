"""coordinator <-> expert: rows out, tokens in, one message each way a tick."""

from __future__ import annotations

import msgspec

from server.wire.base import Message, Stop


class Bare(Message, frozen=True, tag="Bare"):
    """Benchmark: run `sequences` prompts of `prompt_tokens` for `tokens` greedy steps without any rendezvous."""

    sequences: int
    prompt_tokens: int
    tokens: int


class Add(Message, frozen=True, tag="Add"):
    """Put a sequence into the engine before its next step.

    `slot` names the sequence on this socket while it is there, `sequence` for ever; `tokens` are its prompt and the
    tokens generated so far; rows report position len(tokens) first. `exact_ids` are ids whose log-probability every
    row must carry. `temperature` divides this expert's logits. `score`: also answer with `Scored` for the tokens
    themselves. `given`: the tokens that will follow; a row's own is one more of its exact ids, the last. `grammar`
    masks the logits of every row; the last `generated` of the tokens are already part of what it describes. An engine
    that cannot follow it answers with `Refused` and shows no more rows.
    """

    slot: int
    sequence: int
    tokens: list[int]
    priority: int
    exact_ids: list[int] = msgspec.field(default_factory=list)
    temperature: float = 1.0
    score: bool = False
    grammar: str | None = None
    generated: int = 0
    given: list[int] = msgspec.field(default_factory=list)


class Tick(Message, frozen=True, tag="Tick"):
    """Run one step. `tokens` (int32[B]) are for the rows of the last `Report`, in its order; then `drop` and `park`
    take effect, then `add`. A row that nothing was decided for gets any valid token: its slot is dropped or parked.

    A parked sequence leaves the engine like a dropped one, but may still be asked for by `Gather` until it is added
    again or dropped.
    """

    number: int
    tokens: bytes
    drop: list[int]
    park: list[int]
    add: list[Add]


class Gather(Message, frozen=True, tag="Gather"):
    """Ask for exact log-probabilities of `ids` (int32[B, U], -1 for none) of the last rows of `slots` (int32[B]).

    `number` comes back in the answer, so that a late one is not taken for another's.
    """

    number: int
    slots: bytes
    ids: bytes


class Ready(Message, frozen=True, tag="Ready"):
    """The engine is loaded. `kv_tokens`: KV-cache capacity in tokens; `block_size`: tokens per KV block."""

    kv_tokens: int
    block_size: int
    max_model_len: int
    vocab_size: int
    hidden_size: int
    version: str


class Load(Message, frozen=True, tag="Load"):
    """An engine's load: KV-cache use in [0, 1], running sequences, preemptions since start. Sent alone when the engine
    falls empty."""

    kv_used: float
    running: int
    preemptions: int


class Report(Message, frozen=True, tag="Report"):
    """Rows at a sampling position in step `number`.

    `slots` int32[B], `positions` int32[B] (index of the token to be chosen, prompt included), `ids` int32[B, K],
    `logprobs` float32[B, K] normalised over the whole vocabulary, `exact` float32[B, X] for each slot's own exact ids
    (-inf past its own), `projected` float32[B, d] ("" without a hidden-state gate). `step_seconds`: from the
    start of the step to this report. `cached_tokens`: sequence -> prompt tokens found in the prefix cache.
    """

    number: int
    slots: bytes
    positions: bytes
    ids: bytes
    logprobs: bytes
    exact: bytes
    projected: bytes
    step_seconds: float
    load: Load
    cached_tokens: dict[int, int]


class Gathered(Message, frozen=True, tag="Gathered"):
    """Answer to `Gather`: float32[B, U], -inf for id -1."""

    number: int
    logprobs: bytes


class Scored(Message, frozen=True, tag="Scored"):
    """Log-probability of each prompt token but the first under this expert: float32[len(tokens) - 1]."""

    sequence: int
    logprobs: bytes


class Refused(Message, frozen=True, tag="Refused"):
    """The engine cannot follow this sequence's grammar; `message` says why. The sequence waits to be dropped."""

    sequence: int
    message: str


class BareDone(Message, frozen=True, tag="BareDone"):
    """Answer to `Bare`: the duration of each decoding step, in seconds."""

    step_seconds: list[float]


ToExpert = Tick | Gather | Bare | Stop
FromExpert = Ready | Report | Load | Gathered | Scored | Refused | BareDone
