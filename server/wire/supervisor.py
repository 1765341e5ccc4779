"""supervisor <-> coordinator: which processes there are, and how the deployment starts and ends."""

from __future__ import annotations

from server.wire.base import Message, Stop

CONTROL_SOCKET = "control"
"""Name of the socket that the coordinator binds for it."""


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


FromSupervisor = ExpertUp | ExpertDown | Drain | Stop
ToSupervisor = CoordinatorReady | RestartExpert | RemoteNote | Drained
