"""Sockets between the processes: msgspec messages over ZeroMQ, nothing else. The only module that imports zmq.

Every conversation is one DEALER pair; one side binds, the other connects. Endpoints are `ipc://` files in a private
directory (0700) that the supervisor makes and removes.
Nothing is pickled, and a message that does not decode as one of the expected types is an error.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from server.messages import Message

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing", bound=Message)

_LINGER_MS = 500
_SPIN_SECONDS = 0.002
_FLUSH_SECONDS = 0.1
"""How often a process that waits for a message tries again to send what its peer was not there for."""


def endpoint(directory: Path, name: str) -> str:
    """The ipc endpoint called `name` in the deployment's private directory."""
    return f"ipc://{directory}/{name}"


class Channel(Generic[Incoming, Outgoing]):
    """A blocking channel, for the coordinator and the workers.

    `incoming` is the union of message types this side accepts. `spins`: whether `receive` looks for a message for a
    moment before it sleeps (see `server.placement`).
    """

    def __init__(self, address: str, incoming: object, *, bind: bool, spins: bool = False) -> None:
        self._spins = spins
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, _LINGER_MS)
        self._socket.set_hwm(0)
        if bind:
            self._socket.bind(address)
        else:
            self._socket.connect(address)
        self._unsent: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)

    def send(self, message: Outgoing) -> None:
        """Queue `message`; never blocks. A message for a peer that has not connected yet waits for it here."""
        self._unsent.append(self._encoder.encode(message))
        self.flush()

    def flush(self) -> None:
        """Hand what waits to the socket, as far as it takes it."""
        try:
            while self._unsent:
                self._socket.send(self._unsent[0], zmq.NOBLOCK)
                self._unsent.popleft()
        except zmq.Again:
            return

    def receive(self, timeout: float | None) -> Incoming | None:
        """The next message, or None after `timeout` seconds (None: wait for ever, 0: do not wait)."""
        self.flush()
        if self._spins and spin(self.waiting):
            return self.take()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._socket.poll(self._patience(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                return None
            self.flush()
        return self.take()

    def _patience(self, deadline: float | None) -> int | None:
        """Milliseconds to sleep at most: until `deadline`, but not for long while something is unsent."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._unsent:
            left = _FLUSH_SECONDS if left is None else min(left, _FLUSH_SECONDS)
        return None if left is None else round(1000 * left)

    def waiting(self) -> bool:
        """Whether a message has arrived."""
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def take(self) -> Incoming:
        """The next message, waiting for it."""
        return self._decoder.decode(self._socket.recv())

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._socket

    def drain(self) -> Iterable[Incoming]:
        """All messages that have already arrived."""
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield self._decoder.decode(frame)

    def close(self) -> None:
        self._socket.close()


def spin(found: Callable[[], bool]) -> bool:
    """Ask `found` again and again for a moment, giving way to any other thread on this core; whether it was."""
    deadline = time.perf_counter() + _SPIN_SECONDS
    while not found():
        if time.perf_counter() > deadline:
            return False
        os.sched_yield()
    return True


def terminate() -> None:
    """Close every socket of this process once what was sent has left it."""
    zmq.Context.instance().destroy(linger=_LINGER_MS)


class Selector:
    """Waits for several channels at once and hands each message to its channel's handler."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._handlers: dict[zmq.Socket[bytes], tuple[Channel[Any, Any], Callable[[Any], None]]] = {}

    def register(self, channel: Channel[Incoming, Outgoing], handler: Callable[[Incoming], None]) -> None:
        self._poller.register(channel.socket, zmq.POLLIN)
        self._handlers[channel.socket] = (channel, handler)

    def unregister(self, channel: Channel[Incoming, Outgoing]) -> None:
        """Before the channel is closed."""
        self._poller.unregister(channel.socket)
        del self._handlers[channel.socket]

    def dispatch(self, timeout: float, *, spins: bool = False) -> None:
        """Wait at most `timeout` seconds for anything; handle one message of each channel that has some. `spins`: look
        for a moment before sleeping."""
        for channel, _ in self._handlers.values():
            channel.flush()
        if spins:
            spin(lambda: any(channel.waiting() for channel, _ in self._handlers.values()))
        for socket, _ in self._poller.poll(round(timeout * 1000)):
            # A handler before this one may have closed the channel.
            if (entry := self._handlers.get(socket)) is not None:
                channel, handler = entry
                handler(channel.take())


class AsyncChannel(Generic[Incoming, Outgoing]):
    """The same channel for an asyncio process (the api)."""

    def __init__(self, address: str, incoming: object, *, bind: bool) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, _LINGER_MS)
        self._socket.set_hwm(0)
        if bind:
            self._socket.bind(address)
        else:
            self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)

    async def send(self, message: Outgoing) -> None:
        await self._socket.send(self._encoder.encode(message))

    async def receive(self) -> Incoming:
        return self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close()
