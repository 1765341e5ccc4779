"""Every message survives its journey, and anything else is refused."""

from __future__ import annotations

import msgspec
import pytest

from server.policy import Single, Uniform, Weights
from server.request import FinishReason, SamplingParams, SequenceRequest
from server.wire import api, base, expert, stats, supervisor
from server.wire.api import (
    Abort,
    BareTimes,
    Ended,
    GateLoaded,
    GetStats,
    LoadGate,
    Progress,
    Recorded,
    RunBare,
    Status,
    Submit,
    TokenDetails,
)
from server.wire.base import Message, Stop
from server.wire.expert import Add, Bare, BareDone, GetRows, Load, Ready, Refused, Report, Scored, Tick, WholeRows
from server.wire.stats import ExpertStats, FusionStats, Histogram, Stats
from server.wire.supervisor import CoordinatorReady, Drain, Drained, ExpertDown, ExpertUp, RemoteNote, RestartExpert

REQUEST = SequenceRequest(
    id=2**40,
    prompts=[[1, 2], []],
    policy=Weights({"a": -0.5, "b": 2.0}),
    sampling=SamplingParams(0.5, 0.9, 3, 0.1, 2**64 - 1, 0.1, 0.2, 1.3, {5: -100.0, 7: 2.5}),
    max_tokens=9,
    min_tokens=2,
    stop_token_ids=[3],
    temperatures=[0.5, 2.0],
    top_logprobs=0,
    expert_weights=True,
    priority=-3,
)
HISTOGRAM = Histogram([0.1, 1.0], [3, 0, 2], 4.5)
LOAD = Load(0.25, 3, 1)
REPORT = Report(1, *(bytes([number] * 8) for number in range(7)), 0.01, LOAD, {2**40: 16})
BYTES, WHOLE = {"lists": 9, "rows": 2**40}, {"token": 3, "logprobs": 0}
EXPERT = ExpertStats("a", True, "0.32.0", 2, HISTOGRAM, 5, HISTOGRAM, 0.5, 4, 0.25, 1024, 3, 1, 7, 70, 32, BYTES)
FUSION = FusionStats(18, 6, {"certain": 12, "open": 6}, HISTOGRAM)
STATS = Stats(*range(8), {"stop": 2}, HISTOGRAM, HISTOGRAM, {"fuse": 0.5}, HISTOGRAM, WHOLE, FUSION, [EXPERT])

SAMPLES = {
    api.FromApi: [
        Submit([REQUEST, SequenceRequest(1, [[1], [1]], Single("a"))]),
        Submit([SequenceRequest(1, [[1]], Uniform(space="prob"))]),
        Abort([1, 2]),
        GetStats(),
        LoadGate("/gates/gate.pt"),
        RunBare([0, 2], Bare(4, 5, 6)),
    ],
    api.ToApi: [
        Progress([4, 5], [0, 9], {4: TokenDetails(-0.5, 1, [(1, -0.5), (2, -1.5)], [0.5, -0.5])}, {5: 16}),
        Recorded([4, 5], b"\x01" * 16, b"\x02" * 16, b"\x03" * 8, b"\x04" * 16, b"\x05" * 8),
        Ended(4, FinishReason.STOP, 17),
        GateLoaded("no gate checkpoint at /gates/gate.pt"),
        Ended(5, FinishReason.ERROR, message="the queue is full", code="overloaded"),
        Status(True, False, {"a": "up", "b": "starting"}),
        STATS,
        BareTimes({0: [0.1, 0.2], 3: []}),
        Stop(),
    ],
    expert.ToExpert: [
        Tick(3, b"\x01\x00\x00\x00", [1], [2, 3], [Add(1, 2**40, [5, 6], -(2**50), [7], 0.5, True)]),
        GetRows(7, b"\x00" * 8, "/proc/17/fd/5"),
        Bare(1, 2, 3),
        Stop(),
    ],
    expert.FromExpert: [
        Ready(4096, 16, 2048, 264, 128, "0.32.0"),
        REPORT,
        LOAD,
        WholeRows(7, b"\x00\x00\x80\xff"),
        WholeRows(7, None),
        Scored(2**40, b"\x00" * 8),
        Refused(2**40, "not a grammar"),
        BareDone([0.1, 0.2]),
    ],
    supervisor.FromSupervisor: [ExpertUp(1, 2), ExpertDown(1, 2, "ended with exit code -9"), Drain(30.0), Stop()],
    supervisor.ToSupervisor: [
        CoordinatorReady(),
        RestartExpert(0, 4, "no answer for 60 s"),
        RemoteNote(1, ""),
        Drained(),
    ],
}
CASES = [(union, sample) for union, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize(("union", "sample"), CASES, ids=[type(sample).__name__ for _, sample in CASES])
def test_round_trip(union, sample):
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(sample), type=union)
    assert type(decoded) is type(sample)
    assert decoded == sample


def test_no_message_is_left_out():
    def parts(value):
        yield type(value)
        if isinstance(value, Message):
            inner = [getattr(value, name) for name in value.__struct_fields__]
        else:
            inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        for item in inner:
            yield from parts(item)

    sampled = {kind for _, sample in CASES for kind in parts(sample)}
    named = [kind for module in (api, base, expert, stats, supervisor) for kind in vars(module).values()]
    defined = {kind for kind in named if isinstance(kind, type) and issubclass(kind, Message)}
    assert defined - sampled == {Message}


@pytest.mark.parametrize("union", list(SAMPLES), ids=range(len(SAMPLES)))
def test_a_message_of_another_conversation_is_refused(union):
    foreign = TokenDetails(0.0, 1, [], [])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(foreign), type=union)
