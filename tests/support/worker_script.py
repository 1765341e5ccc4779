"""A conversation with a worker over a fake engine, in one thread: what it is told, message by message."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from server.expert.worker import Worker
from server.wire.base import Stop
from server.wire.expert import GetRows, Report, Tick
from tests.support.fake_engine import Behaviour, FakeEngine, FakeModel

MODEL = FakeModel(0)
Answer = Callable[["Script"], object]


class Script:
    """A conversation: `says` are the coordinator's messages in order, each given as it is or made from what came so
    far; then `Stop`."""

    def __init__(self, *says: object | Answer) -> None:
        self._says = [*says, Stop()]
        self.heard: list = []

    def receive(self, timeout):
        assert timeout is None
        said = self._says.pop(0)
        return said(self) if callable(said) else said

    def send(self, message) -> None:
        self.heard.append(message)

    def close(self) -> None: ...

    @property
    def reports(self) -> list[Report]:
        return [message for message in self.heard if isinstance(message, Report)]

    def of(self, kind: type) -> list:
        return [message for message in self.heard if isinstance(message, kind)]


def run(
    *says: object | Answer, behaviour: Behaviour | None = None, top_k=4, projector=None
) -> tuple[Script, FakeEngine]:
    engine = FakeEngine(MODEL, behaviour, want_hidden=projector is not None)
    script = Script(*says)
    Worker(engine, script, expert=1, top_k=top_k, projector=projector).run()
    return script, engine


def get_rows(slots: list[int], memory: str = "", number: int = 1) -> GetRows:
    """Ask for whole rows."""
    return GetRows(number, np.array(slots, np.int32).tobytes(), memory)


def tick(number: int = 1, *, tokens=(), drop=(), park=(), add=()) -> Tick:
    return Tick(number, np.array(tokens, np.int32).tobytes(), list(drop), list(park), list(add))


def tokens_for(report: Report, **chosen: int) -> list[int]:
    """`s3=7` chooses token 7 for slot 3, in the order of the report's rows."""
    return [chosen[f"s{slot}"] for slot in np.frombuffer(report.slots, np.int32)]


def whole(tokens: list[int], temperature: float = 1.0) -> np.ndarray:
    """float64[V] log-probabilities of what follows `tokens`."""
    return log_softmax(MODEL.logits(tokens).astype(np.float64) / temperature)
