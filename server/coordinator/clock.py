"""Where a tick's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from server.metrics.histogram import Buckets

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096)


class Phase(StrEnum):
    """A tick lasts from one start of the engines' steps to the next, and each moment of it belongs to one phase."""

    ENGINE = "engine"
    """The slowest engine's step, up to its report."""

    EXCHANGE = "exchange"
    """The rest of the wait for the reports: messages, the end of the engines' last step, and the coordinator's own work
    meanwhile."""

    ALIGN = "align"
    """Rows are kept, and sequences that are not complete parked."""

    FUSE = "fuse"
    """The fusion, but for what is in `LOOK_UP` and `GATE`."""

    LOOK_UP = "look_up"
    """Whole rows come from the experts, and are fused."""

    GATE = "gate"
    """The gate gives coefficients."""

    SAMPLE = "sample"
    """Tokens are chosen."""

    SEND = "send"
    """All else, up to the engines' next step: tokens are appended, sequences admitted, the engines told."""


class TickClock:
    """Adds up the time of each phase. The coordinator's methods say by `timed` which phase they are."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(Phase, 0.0)
        self.ticks = Buckets(SECONDS)
        self._phase = Phase.EXCHANGE
        self._started = self._switched = time.perf_counter()
        self._ticking = False

    def start(self, slowest: float | None) -> None:
        """All reports are there; the slowest engine took `slowest` seconds for its step. None: no engine had one to do,
        so that this is no tick."""
        self._ticking = slowest is not None
        before = self._switched
        self.switch(Phase.SEND)
        if slowest is not None:
            engine = min(slowest, self._switched - before)
            self.seconds[Phase.ENGINE] += engine
            self.seconds[Phase.EXCHANGE] -= engine

    def switch(self, phase: Phase) -> Phase:
        """From now on time is of `phase`; of which it was until now."""
        now, last = time.perf_counter(), self._phase
        if self._ticking:
            self.seconds[last] += now - self._switched
        self._phase, self._switched = phase, now
        return last

    def stop(self) -> None:
        """The engines start their next step."""
        self.switch(Phase.EXCHANGE)
        if self._ticking:
            self.ticks.observe(self._switched - self._started)
        self._started = self._switched


class Timed(Protocol):
    """What has methods of which the time is taken."""

    clock: TickClock


Owner = TypeVar("Owner", bound=Timed)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def timed(
    phase: Phase,
) -> Callable[[Callable[Concatenate[Owner, Parameters], Result]], Callable[Concatenate[Owner, Parameters], Result]]:
    """Decorates a method: the time in it is of `phase`, but for that in a timed method which it calls."""

    def decorate(
        method: Callable[Concatenate[Owner, Parameters], Result],
    ) -> Callable[Concatenate[Owner, Parameters], Result]:
        @wraps(method)
        def within(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            outer = self.clock.switch(phase)
            try:
                return method(self, *args, **kwargs)
            finally:
                self.clock.switch(outer)

        return within

    return decorate
