"""api <-> coordinator: sequences in, tokens out."""

from __future__ import annotations

import msgspec

from server.request import FinishReason, SequenceRequest
from server.wire.base import Message, Stop
from server.wire.expert import Bare
from server.wire.stats import Stats

API_SOCKET = "api"
"""Name of the socket that the coordinator binds for it."""


class Submit(Message, frozen=True, tag="Submit"):
    """Start these sequences."""

    sequences: list[SequenceRequest]
    """Each has a number that the api has never used before."""


class Abort(Message, frozen=True, tag="Abort"):
    """Stop these sequences. An aborted sequence gets no `Ended`."""

    sequences: list[int]
    """Their numbers; unknown or ended ones are ignored."""


class GetStats(Message, frozen=True, tag="GetStats"):
    """Ask for one `Stats`."""


class LoadGate(Message, frozen=True, tag="LoadGate"):
    """From the next tick on, coefficients come from another checkpoint. Answered by `GateLoaded`.

    The projections of hidden states, which run beside the engines, stay those of the first gate: the new one must
    project alike. State that running sequences have gathered goes on under the new gate.
    """

    path: str
    """Of the checkpoint."""


class RunBare(Message, frozen=True, tag="RunBare"):
    """Benchmark: run several idle engines by themselves, at the same time. Answered by `BareTimes`."""

    experts: list[int]
    """Indices of those to run."""
    bare: Bare
    """What each runs."""


class TokenDetails(Message, frozen=True, tag="TokenDetails"):
    """What a request for log-probabilities or expert weights gets beside one token."""

    logprob: float
    """The token's, natural log, under the fused distribution before penalties and temperature."""
    rank: int
    """The token's place in that distribution, from 1."""
    top: list[tuple[int, float]]
    """(token id, log-probability) of the most probable tokens, best first."""
    coefficients: list[float]
    """The E fusion coefficients of this token."""


class SequenceTiming(msgspec.Struct, array_like=True, gc=False):
    """When what happened to a sequence up to its first token. Seconds on the clock of `time.perf_counter`, which all
    processes of a machine share; 0 for what has not happened."""

    queued: float
    """It was submitted."""
    prefilled: list[float]
    """Each of the E experts had read its prompt; 0 for those that it does not use."""
    admitted: float = 0.0
    """It was given to the engines."""
    first_token: float = 0.0
    """Its first token was sampled."""


class Progress(Message, frozen=True, tag="Progress"):
    """One tick's tokens."""

    sequences: list[int]
    """B sequences that got one."""
    tokens: list[int]
    """B token ids, one for each of `sequences`."""
    details: dict[int, TokenDetails] = msgspec.field(default_factory=dict)
    """Sequence -> what it asked for beside the token, for those that did."""
    cached_tokens: dict[int, int] = msgspec.field(default_factory=dict)
    """Sequence -> prompt tokens found in every prefix cache, for those whose first token this is."""
    timings: dict[int, SequenceTiming] = msgspec.field(default_factory=dict)
    """Sequence -> its moments, for those whose first token this is and that are timed."""


class Ended(Message, frozen=True, tag="Ended"):
    """The one terminal message of a sequence. It follows the `Progress` with its last token."""

    sequence: int
    """Its number."""
    reason: FinishReason
    """Why it ended."""
    stop_token: int | None = None
    """The stop token that ended it; it was in `Progress` too."""
    message: str = ""
    """What an error was, in one line."""
    code: str = ""
    """Of an error: "overloaded" when nothing was generated because the queue is full or the server drains, "too_long"
    when the prompt does not fit, "invalid_grammar" when an engine cannot follow the grammar; else ""."""


class Status(Message, frozen=True, tag="Status"):
    """Sent on every change."""

    ready: bool
    """New requests are accepted."""
    draining: bool
    """The server shuts down once what runs has ended."""
    experts: dict[str, str]
    """Name -> "up", "starting" or "down"."""


class Recorded(Message, frozen=True, tag="Recorded"):
    """What the experts showed in one tick for B sequences that asked (`SequenceRequest.record`); the chosen tokens
    follow in the tick's `Progress`."""

    sequences: list[int]
    """B numbers."""
    ids: bytes
    """int32[B, E, K]: each expert's most probable tokens, best first, as many as the gate reads; -1 where it gave
    nothing."""
    logprobs: bytes
    """float32[B, E, K]: theirs, normalised over the whole vocabulary; -inf where it gave nothing."""
    projected: bytes
    """float32[B, E, d]: what the gate's projections made of the hidden states; "" without a gate that reads them."""
    token_logprobs: bytes
    """float32[B, E]: each expert's log-probability of the chosen token, over the whole vocabulary; -inf where it gave
    nothing."""
    log_normaliser: bytes
    """float32[B]: log of the sum of exp(score / temperature) over the vocabulary, of the fused scores sum c_i log p_i
    or log sum c_i p_i, at the temperature that the sequence samples at (1 if it is greedy). Where log-probabilities
    were asked for, within the tolerance; else the middle of what the lists allow."""


class GateLoaded(Message, frozen=True, tag="GateLoaded"):
    """Answer to `LoadGate`."""

    problem: str
    """Why the old gate stays, in one line; "" where it does not."""


class BareTimes(Message, frozen=True, tag="BareTimes"):
    """Answer to `RunBare`."""

    seconds: dict[int, list[float]]
    """Expert -> seconds of each step."""


FromApi = Submit | Abort | GetStats | LoadGate | RunBare
ToApi = Progress | Recorded | Ended | Status | Stats | GateLoaded | BareTimes | Stop
