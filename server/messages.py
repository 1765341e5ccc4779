"""Everything that crosses a process, one small struct each. Arrays travel as little-endian bytes with their dtype named
in a comment; shapes follow from the row count. Letters: B rows, E experts, K top-k, X exact ids, d projected size.

Three conversations, each a pair of sockets (`server.transport`):
    api         <-> coordinator   Submit, Abort, GetStats, LoadGate, RunBare / Progress, Trace, Ended, Stats, Status,
                                                                            GateLoaded, BareTimes
    coordinator <-> expert        Tick, Gather, Bare              / Ready, Report, Load, Gathered, Scored, Refused,
                                                                    BareDone
    supervisor  <-> coordinator   ExpertUp, ExpertDown, Drain,... / CoordinatorReady, RestartExpert, RemoteNote, Drained
"""

from __future__ import annotations

import msgspec

from server.request import FinishReason, SequenceRequest


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages: positional, tagged by class name."""


# --- api -> coordinator -------------------------------------------------------------------------------------------


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


class Bare(Message, frozen=True, tag="Bare"):
    """Benchmark: run `sequences` prompts of `prompt_tokens` for `tokens` greedy steps without any rendezvous."""

    sequences: int
    prompt_tokens: int
    tokens: int


class RunBare(Message, frozen=True, tag="RunBare"):
    """Benchmark: run `bare` in several idle engines at the same time. Answered by `BareTimes`."""

    experts: list[int]
    bare: Bare


# --- coordinator -> api -------------------------------------------------------------------------------------------


class Choice(Message, frozen=True, tag="Choice"):
    """What a request for log-probabilities or expert weights gets beside one token.

    `logprob` is the chosen token's, natural log, of the fused distribution before penalties and temperature, `rank` its
    place there, from 1; `top` holds (token id, log-probability), best first; `coefficients` the E fusion coefficients
    of this token.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]
    coefficients: list[float]


class Timing(msgspec.Struct, array_like=True, gc=False):
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
    choices: dict[int, Choice] = {}
    cached_tokens: dict[int, int] = {}
    timings: dict[int, Timing] = {}


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


class Trace(Message, frozen=True, tag="Trace"):
    """What the experts showed in one tick for B sequences that asked (`SequenceRequest.trace`); the chosen tokens
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


class Histogram(Message, frozen=True, tag="Histogram"):
    """Cumulative histogram since start: `counts[i]` observations in (bounds[i-1], bounds[i]], one more past the
    last."""

    bounds: list[float]
    counts: list[int]
    sum: float


class BareTimes(Message, frozen=True, tag="BareTimes"):
    """Answer to `RunBare`: expert -> seconds of each step."""

    seconds: dict[int, list[float]]


class ExpertStats(Message, frozen=True, tag="ExpertStats"):
    """One expert's part of `Stats`. Seconds and tokens; counters are cumulative since start.

    `weight`: its share of the coefficients of each fused token. `decisive_tokens`: fused tokens for which that share
    was larger than any other's. `slowest_ticks`: ticks in which the others waited for it. `prefilled_tokens`: given to
    the engine with the sequences it started, those started again included; `cached_tokens`: of these, found in its
    prefix cache. `kv_tokens`: what its KV cache holds. `engine`: the engine's version.
    """

    name: str
    up: bool
    engine: str
    restarts: int
    weight: Histogram
    decisive_tokens: int
    step_seconds: Histogram
    barrier_wait_seconds: float
    slowest_ticks: int
    kv_used: float
    kv_tokens: int
    running: int
    preemptions: int
    masked_rows: int
    prefilled_tokens: int
    cached_tokens: int


class Fusion(Message, frozen=True, tag="Fusion"):
    """Counts over fused tokens: those for which at least two experts had a usable row. Cumulative since start.

    `disagreements`: the experts' most probable tokens were not all the same. `certificates`: how many tokens had each
    `server.coordinator.certificate` verdict. `entropy`: of the coefficients' shares, in nats.
    """

    tokens: int
    disagreements: int
    certificates: dict[str, int]
    entropy: Histogram


class Stats(Message, frozen=True, tag="Stats"):
    """A snapshot of the coordinator, for /metrics, `polylogit bench` and tests. `queue_seconds`: from submission to
    admission. `phase_seconds`: phase of the tick -> seconds; the phases make up `tick_seconds`."""

    ticks: int
    tokens: int
    running: int
    queued: int
    parked: int
    readded: int
    position_faults: int
    gate_failures: int
    finished: dict[str, int]
    queue_seconds: Histogram
    tick_seconds: Histogram
    phase_seconds: dict[str, float]
    fusion: Fusion
    experts: list[ExpertStats]


# --- coordinator -> expert ----------------------------------------------------------------------------------------


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
    exact_ids: list[int] = []
    temperature: float = 1.0
    score: bool = False
    grammar: str | None = None
    generated: int = 0
    given: list[int] = []


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


class Stop(Message, frozen=True, tag="Stop"):
    """Leave."""


# --- expert -> coordinator ----------------------------------------------------------------------------------------


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


# --- supervisor <-> coordinator -----------------------------------------------------------------------------------


class ExpertUp(Message, frozen=True, tag="ExpertUp"):
    """A worker process for `expert` (index) was started and will connect to endpoint `generation`."""

    expert: int
    generation: int


class ExpertDown(Message, frozen=True, tag="ExpertDown"):
    """The worker process of `expert` has ended."""

    expert: int
    generation: int
    message: str


class Drain(Message, frozen=True, tag="Drain"):
    """Stop admitting; what still runs after `grace_seconds` is ended with an error. Answered by `Drained`."""

    grace_seconds: float


class CoordinatorReady(Message, frozen=True, tag="CoordinatorReady"):
    """Every expert is loaded and the gate fits them. Sent once."""


class RestartExpert(Message, frozen=True, tag="RestartExpert"):
    """This expert hangs or broke: kill its process and start another."""

    expert: int
    generation: int
    message: str


class RemoteNote(Message, frozen=True, tag="RemoteNote"):
    """Of an expert on another host: why it is not connected, or "" once it is. Sent on every change."""

    expert: int
    message: str


class Drained(Message, frozen=True, tag="Drained"):
    """Nothing runs any more."""


FromApi = Submit | Abort | GetStats | LoadGate | RunBare
ToApi = Progress | Trace | Ended | Status | Stats | GateLoaded | BareTimes | Stop
ToExpert = Tick | Gather | Bare | Stop
FromExpert = Ready | Report | Load | Gathered | Scored | Refused | BareDone
FromSupervisor = ExpertUp | ExpertDown | Drain | Stop
ToSupervisor = CoordinatorReady | RestartExpert | RemoteNote | Drained
