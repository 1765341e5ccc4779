"""supervisor <-> coordinator: which processes there are, and how the deployment starts and ends."""

from __future__ import annotations

from server.wire.base import Message, Stop

CONTROL_SOCKET = "control"
"""Name of the socket that the coordinator binds for it."""


class ExpertUp(Message, frozen=True, tag="ExpertUp"):
    """A worker process was started, and will connect to the socket of its expert and generation."""

    expert: int
    """Index of its expert."""
    generation: int
    """How often that has been started again."""


class ExpertDown(Message, frozen=True, tag="ExpertDown"):
    """A worker process has ended."""

    expert: int
    """Index of its expert."""
    generation: int
    """That of the process: by now there may be another."""
    message: str
    """Why, in one line."""


class Drain(Message, frozen=True, tag="Drain"):
    """Stop admitting. Answered by `Drained`."""

    grace_seconds: float
    """What still runs after so long is ended with an error."""


class CoordinatorReady(Message, frozen=True, tag="CoordinatorReady"):
    """Every expert is loaded and the gate fits them. Sent once."""


class RestartExpert(Message, frozen=True, tag="RestartExpert"):
    """An expert hangs or broke: kill its process and start another."""

    expert: int
    """Its index."""
    generation: int
    """That of the process: a later one is not meant."""
    message: str
    """What is wrong with it, in one line."""


class RemoteNote(Message, frozen=True, tag="RemoteNote"):
    """News of an expert on another host. Sent on every change."""

    expert: int
    """Its index."""
    message: str
    """Why it is not connected, in one line; "" once it is."""


class Drained(Message, frozen=True, tag="Drained"):
    """Nothing runs any more."""


FromSupervisor = ExpertUp | ExpertDown | Drain | Stop
ToSupervisor = CoordinatorReady | RestartExpert | RemoteNote | Drained
