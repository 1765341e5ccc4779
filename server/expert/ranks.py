"""Tensor parallelism: an expert over several devices is one process a rank, each with an engine of its own (vLLM's
`external_launcher` executor: all ranks schedule alike as long as they are told alike).

Rank 0 talks to the coordinator and passes on what it hears; the other ranks hear the same messages in the same order,
reach the same rendezvous in the same steps, and say nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from server.errors import EngineError
from server.placement import Placement, expert_socket
from server.wire.base import Stop
from server.wire.channel import Channel, endpoint
from server.wire.expert import FromExpert, GetRows, ToExpert

_MEET_SECONDS = 120.0


def meeting(directory: Path, place: Placement) -> Path:
    """The file at which the ranks of the expert at `place` find each other: PyTorch keeps there what it would otherwise
    serve over TCP. vLLM names the CPU ranks' shared memory after it, so no two experts of a machine may share the name.
    """
    return directory / f"{directory.name}-{expert_socket(place.expert, place.generation)}-ranks"


class CoordinatorLink(Protocol):
    """A worker's end of its conversation with the coordinator."""

    def send(self, message: FromExpert) -> None: ...

    def receive(self, timeout: float | None) -> ToExpert | None: ...

    def close(self) -> None: ...


def coordinator_link(
    place: Placement, ranks: int, directory: Path, coordinator: CoordinatorLink | None = None
) -> CoordinatorLink:
    """The link of the process at `place`, one of `ranks`. `coordinator`: what the first rank has instead of a
    socket of this host."""
    if place.rank:
        return _Follower(directory, place)
    channel = coordinator or Channel(endpoint(directory, place.socket()), ToExpert, bind=False)
    return _Leader(channel, directory, place, ranks) if ranks > 1 else channel


class _Leader:
    """Rank 0: passes every message on before acting on it."""

    def __init__(self, channel: CoordinatorLink, directory: Path, place: Placement, ranks: int) -> None:
        self._channel = channel
        self._followers: list[Channel[Stop, ToExpert]] = [
            Channel(endpoint(directory, place.socket(rank)), Stop, bind=True) for rank in range(1, ranks)
        ]

    def send(self, message: FromExpert) -> None:
        self._channel.send(message)

    def receive(self, timeout: float | None) -> ToExpert | None:
        message = self._channel.receive(timeout)
        if message is not None:
            for follower in self._followers:
                follower.send(message)
            # What a rank has not heard before the next step it would never hear: the ranks wait for each other in it.
            if not all(follower.deliver(_MEET_SECONDS) for follower in self._followers):
                raise EngineError(f"a rank did not listen for {_MEET_SECONDS:g} s")
        return message

    def close(self) -> None:
        self._channel.close()
        for follower in self._followers:
            follower.close()


class _Follower:
    """Another rank: hears what rank 0 heard."""

    def __init__(self, directory: Path, place: Placement) -> None:
        self._channel: Channel[ToExpert, Stop] = Channel(
            endpoint(directory, place.socket(place.rank)), ToExpert, bind=False
        )
        # Rank 0 must never start a step that this rank has not heard of: both would wait for each other for ever.
        if not self._channel.reach(_MEET_SECONDS):
            raise EngineError(f"rank 0 was not there within {_MEET_SECONDS:g} s")

    def send(self, message: FromExpert) -> None:
        """Rank 0 says the same."""

    def receive(self, timeout: float | None) -> ToExpert | None:
        message = self._channel.receive(timeout)
        while isinstance(message, GetRows):  # rank 0 answers
            message = self._channel.receive(timeout)
        return message

    def close(self) -> None:
        self._channel.close()
