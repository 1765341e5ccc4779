"""Sockets between the processes: msgspec messages over ZeroMQ, nothing else. The only module that imports zmq.

Every conversation is one DEALER pair; one side binds, the other connects. Endpoints are `ipc://` files in a private
directory (0700) that the supervisor makes and removes, or `tcp://` when an expert is placed on another host.
Nothing is pickled, and a message that does not decode as one of the expected types is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from server.messages import Message

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing", bound=Message)

_LINGER_MS = 500


def endpoint(directory: Path, name: str) -> str:
    """The ipc endpoint called `name` in the deployment's private directory."""
    return f"ipc://{directory}/{name}"


class Channel(Generic[Incoming, Outgoing]):
    """A blocking channel, for the coordinator and the workers.

    `incoming` is the union of message types this side accepts.
    """

    def __init__(self, address: str, incoming: object, *, bind: bool) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, _LINGER_MS)
        self._socket.set_hwm(0)
        if bind:
            self._socket.bind(address)
        else:
            self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)  # type: ignore[arg-type]

    def send(self, message: Outgoing) -> None:
        """Queue `message`; never blocks."""
        self._socket.send(self._encoder.encode(message), copy=True)

    def receive(self, timeout: float | None) -> Incoming | None:
        """The next message, or None after `timeout` seconds (None: wait for ever, 0: do not wait)."""
        if timeout is not None and not self._socket.poll(round(timeout * 1000)):
            return None
        return self._decoder.decode(self._socket.recv())

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


class Poller:
    """Waits for any of several channels."""

    def __init__(self, channels: Iterable[Channel[object, Message]] = ()) -> None:
        self._poller = zmq.Poller()
        for channel in channels:
            self.add(channel)

    def add(self, channel: Channel[object, Message]) -> None:
        self._poller.register(channel._socket, zmq.POLLIN)

    def remove(self, channel: Channel[object, Message]) -> None:
        self._poller.unregister(channel._socket)

    def wait(self, timeout: float | None) -> bool:
        """Whether something arrived within `timeout` seconds (None: wait for ever)."""
        return bool(self._poller.poll(None if timeout is None else round(timeout * 1000)))


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
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)  # type: ignore[arg-type]

    async def send(self, message: Outgoing) -> None:
        await self._socket.send(self._encoder.encode(message))

    async def receive(self) -> Incoming:
        return self._decoder.decode(await self._socket.recv())

    def close(self) -> None:
        self._socket.close()
