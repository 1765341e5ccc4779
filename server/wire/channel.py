"""Sockets between the processes: msgspec messages over Unix stream sockets, a frame each (`server.wire.framing`). This
module and `async_channel` open those of this host; `server.remote` those to experts on others.

Every conversation is one pair; one side binds, the other connects, in any order. Addresses are files in a private
directory (0700) that the supervisor makes and removes. Nothing is pickled, and a message that does not decode as one
of the expected types is an error.

Plain sockets rather than a messaging library, because a tick waits for these messages several times: libraries hand
them to a thread of their own, which must then get a turn on cores where an engine is busy.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from server.errors import StartError
from server.wire.base import Message
from server.wire.framing import FrameError, FrameParser, framed

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing", bound=Message)

CHUNK_BYTES = 1 << 18
"""Read from a socket at once."""
RETRY_SECONDS = 0.05
"""How often a process that waits tries again to reach its peer."""
_MAX_ADDRESS_BYTES = 107
"""What Linux takes as a socket's path."""
_MAX_NAME_BYTES = 24
_LINGER_SECONDS = 0.5
_MAX_REMOTE_BYTES = 1 << 31
"""More than any message to or from another host has; a length beyond it is rubbish."""


def endpoint(directory: Path, name: str) -> str:
    """The address called `name` in the deployment's private directory. Raises StartError if that is too deep."""
    if len(bytes(directory)) + _MAX_NAME_BYTES > _MAX_ADDRESS_BYTES:
        raise StartError(f"{directory}: the path is too long for sockets; set TMPDIR to a directory with a shorter one")
    return str(directory / name)


class Channel(Generic[Incoming, Outgoing]):
    """A channel for processes without an event loop: the coordinator, the workers, the supervisor.

    `incoming` is the union of message types this side accepts. A peer that went away may come back; what is sent
    meanwhile waits for it here.
    """

    def __init__(self, address: str, incoming: object, *, bind: bool) -> None:
        self._address = address
        self._listener = _listen(address) if bind else None
        self._socket: socket.socket | None = None
        self._unsent: deque[memoryview] = deque()  # views: what is left of a long message is not copied each time
        self._frames = FrameParser()
        self._messages: deque[Incoming] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)

    def reach(self, timeout: float) -> bool:
        """Wait until the peer is there, at most `timeout` seconds; whether it is."""
        deadline = time.monotonic() + timeout
        while self._peer() is None and time.monotonic() < deadline:
            self._sleep(deadline)
        return self._socket is not None

    def send(self, message: Outgoing) -> None:
        """Send `message`, or keep it until the peer is there and has room; never blocks."""
        self._unsent.append(memoryview(framed(self._encoder.encode(message))))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the peer takes it."""
        while self._unsent and (peer := self._peer()) is not None:
            frame = self._unsent[0]
            try:
                sent = peer.send(frame, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                self._disconnect()
                return
            if sent < len(frame):
                self._unsent[0] = frame[sent:]
                return
            self._unsent.popleft()

    def deliver(self, timeout: float) -> bool:
        """Wait until everything sent has left, at most `timeout` seconds; whether it has."""
        deadline = time.monotonic() + timeout
        self.flush()
        while self._unsent and time.monotonic() < deadline:
            self._sleep(deadline)
            self.flush()
        return not self._unsent

    def receive(self, timeout: float | None) -> Incoming | None:
        """The next message, or None after `timeout` seconds (None: wait for ever, 0: do not wait)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.waiting():
            self.flush()
            if deadline is not None and time.monotonic() >= deadline:
                return None
            self._sleep(deadline)
        return self.take()

    def take(self) -> Incoming:
        """The next message that has arrived."""
        return self._messages.popleft()

    def waiting(self) -> bool:
        """Whether a message has arrived."""
        if not self._messages and (peer := self._peer()) is not None:
            self._read(peer)
        return bool(self._messages)

    def drain(self) -> list[Incoming]:
        """All messages that have already arrived."""
        self.flush()
        found = []
        while self.waiting():
            found.append(self.take())
        return found

    def fileno(self) -> int | None:
        """What becomes readable when something happens; None while the peer's socket is not there."""
        if (peer := self._peer()) is not None:
            return peer.fileno()
        return None if self._listener is None else self._listener.fileno()

    @property
    def connected(self) -> bool:
        """Whether the peer was there when it was last looked for."""
        return self._socket is not None

    @property
    def interest(self) -> int:
        """What to poll `fileno` for."""
        return select.POLLIN | (select.POLLOUT if self._unsent and self._socket is not None else 0)

    @property
    def must_retry(self) -> bool:
        """Whether the peer must be looked for again: no file will tell when it is there."""
        return self._socket is None and self._listener is None

    def close(self) -> None:
        """Close, once what was sent has left or the peer had half a second for it."""
        deadline = time.monotonic() + _LINGER_SECONDS
        while self._unsent and self._peer() is not None and time.monotonic() < deadline:
            self.flush()
            time.sleep(0.001)
        self._unsent.clear()
        self._disconnect()
        if self._listener is not None:
            self._listener.close()
            Path(self._address).unlink(missing_ok=True)
            self._listener = None

    def _peer(self) -> socket.socket | None:
        """The connected socket, if the peer is there."""
        if self._socket is None:
            self._socket = _connect(self._address) if self._listener is None else _accept(self._listener)
        return self._socket

    def _disconnect(self) -> None:
        """Forget the peer and what it had not finished saying, or been told."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._frames.clear()
        self._unsent.clear()

    def _read(self, peer: socket.socket) -> None:
        """Take in what has arrived."""
        try:
            data = peer.recv(CHUNK_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._disconnect()
            return
        self._frames.feed(data)
        while (frame := self._frames.pop()) is not None:
            self._messages.append(self._decoder.decode(frame))

    def _sleep(self, deadline: float | None) -> None:
        """Until something happens, `deadline`, or it is time to try again what was not possible."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        _sleep([self], left)


class ConnectedChannel(Channel[Incoming, Outgoing]):
    """A channel over a socket that is connected already, to a peer on another host; it ends with that socket. A peer
    that sends rubbish is cut off."""

    def __init__(self, peer: socket.socket, incoming: object) -> None:
        super().__init__("", incoming, bind=False)
        self._frames = FrameParser(_MAX_REMOTE_BYTES)
        self._socket = peer

    @property
    def ended(self) -> bool:
        """Whether the peer has gone and everything that it said was taken."""
        return self._socket is None and not self._messages

    def _peer(self) -> socket.socket | None:
        return self._socket

    def _read(self, peer: socket.socket) -> None:
        try:
            super()._read(peer)
        except (msgspec.DecodeError, FrameError):
            self._disconnect()


class Selector:
    """Waits for several channels at once and hands each message to its channel's handler."""

    def __init__(self) -> None:
        self._handlers: dict[Channel[Any, Any], Callable[[Any], None]] = {}

    def register(self, channel: Channel[Incoming, Outgoing], handler: Callable[[Incoming], None]) -> None:
        self._handlers[channel] = handler

    def unregister(self, channel: Channel[Incoming, Outgoing]) -> None:
        """Before the channel is closed."""
        del self._handlers[channel]

    def dispatch(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for anything; handle one message of each channel that has some."""
        for channel in self._handlers:
            channel.flush()
        if not any(channel.waiting() for channel in self._handlers):
            _sleep(list(self._handlers), timeout)
        for channel in list(self._handlers):
            # A handler before this one may have unregistered the channel.
            if (handler := self._handlers.get(channel)) is not None and channel.waiting():
                handler(channel.take())


def _sleep(channels: list[Channel[Any, Any]], timeout: float | None) -> None:
    """Until one of `channels` becomes readable, at most `timeout` seconds (None: for ever)."""
    poller = select.poll()
    for channel in channels:
        if (number := channel.fileno()) is not None:
            poller.register(number, channel.interest)
        if channel.must_retry:
            timeout = RETRY_SECONDS if timeout is None else min(timeout, RETRY_SECONDS)
    poller.poll(None if timeout is None else round(1000 * timeout))


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(1)
    listener.setblocking(False)
    return listener


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except BlockingIOError:
        return None


def _connect(address: str) -> socket.socket | None:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.connect(address)
    except OSError:
        peer.close()
        return None
    return peer
