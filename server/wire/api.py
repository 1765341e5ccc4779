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
    """Start these sequences. The api gives each a number it has never used before."""

    sequences: list[SequenceRequest]


class Abort(Message, frozen=True, tag="Abort"):
    """Stop these sequences; unknown or ended ones are ignored. An aborted sequence gets no `Ended`."""

    sequences: list[int]


class GetStats(Message, frozen=True, tag="GetStats"):
    """Ask for one `Stats`."""


class LoadGate(Message, frozen=True, tag="LoadGate"):
    """From the next tick on, coefficients come from the checkpoint at `path`. Answered by `GateLoaded`.

    The projections of hidden states, which run beside the engines, stay those of the first gate: the new one must
    project alike. State that running sequences have gathered goes on under the new gate.
    """

    path: str


class RunBare(Message, frozen=True, tag="RunBare"):
    """Benchmark: run `bare` in several idle engines at the same time. Answered by `BareTimes`."""

    experts: list[int]
    bare: Bare


class TokenDetails(Message, frozen=True, tag="TokenDetails"):
    """What a request for log-probabilities or expert weights gets beside one token.

    `logprob` is the chosen token's, natural log, of the fused distribution before penalties and temperature, `rank` its
    place there, from 1; `top` holds (token id, log-probability), best first; `coefficients` the E fusion coefficients
    of this token.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]
    coefficients: list[float]


class SequenceTiming(msgspec.Struct, array_like=True, gc=False):
    """When a sequence was queued and admitted, each of the E experts had read its prompt (0: it does not use it), and
    its first token was chosen. Seconds on the clock of `time.perf_counter`, which all processes of a machine share."""

    queued: float
    prefilled: list[float]
    admitted: float = 0.0
    first_token: float = 0.0


class Progress(Message, frozen=True, tag="Progress"):
    """One tick's tokens: `tokens[i]` belongs to `sequences[i]`; `choices` has an entry for sequences that asked.

    `cached_tokens` has one for sequences with their first token: prompt tokens found in every prefix cache; `timings`
    for those of them that are timed.
    """

    sequences: list[int]
    tokens: list[int]
    choices: dict[int, TokenDetails] = msgspec.field(default_factory=dict)
    cached_tokens: dict[int, int] = msgspec.field(default_factory=dict)
    timings: dict[int, SequenceTiming] = msgspec.field(default_factory=dict)


class Ended(Message, frozen=True, tag="Ended"):
    """The one terminal message of a sequence. It follows the `Progress` with its last token.

    `stop_token`: the stop token that ended it (it was in `Progress` too). `message` and `code` explain an `error`;
    `code` is "overloaded" when nothing was generated because the queue is full or the server drains, and
    "invalid_grammar" when an engine cannot follow the grammar.
    """

    sequence: int
    reason: FinishReason
    stop_token: int | None = None
    message: str = ""
    code: str = ""


class Status(Message, frozen=True, tag="Status"):
    """Sent on every change. `experts`: name -> "up", "starting" or "down". `ready`: new requests are accepted."""

    ready: bool
    draining: bool
    experts: dict[str, str]


class Recorded(Message, frozen=True, tag="Recorded"):
    """What the experts showed in one tick for B sequences that asked (`SequenceRequest.record`); the chosen tokens
    follow in the tick's `Progress`.

    `ids` int32[B, E, K], `logprobs` float32[B, E, K], best first, normalised over the whole vocabulary; -1 and -inf
    where an expert gave nothing. `projected` float32[B, E, d]: what the gate's projections made of the hidden states
    ("" without a gate that reads them).
    """

    sequences: list[int]
    ids: bytes
    logprobs: bytes
    projected: bytes


class GateLoaded(Message, frozen=True, tag="GateLoaded"):
    """Answer to `LoadGate`; `problem` says in one line why the old gate stays, if it does."""

    problem: str


class BareTimes(Message, frozen=True, tag="BareTimes"):
    """Answer to `RunBare`: expert -> seconds of each step."""

    seconds: dict[int, list[float]]


FromApi = Submit | Abort | GetStats | LoadGate | RunBare
ToApi = Progress | Recorded | Ended | Status | Stats | GateLoaded | BareTimes | Stop
