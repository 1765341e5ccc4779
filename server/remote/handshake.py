"""How the coordinator and an expert's worker on another host come to trust each other, before any message passes.

Both know one secret. Each sends 32 random bytes, and proves the secret by an HMAC-SHA256 over its own role and both
numbers; the coordinator first, so that a stranger at the worker's port gets a random number and nothing else. A proof
sent back to its sender is worthless, because the roles differ, and so is one heard earlier, because the numbers do.
Then the coordinator makes its offer (`server.remote.agreement`), and the worker agrees or says why not.

Every frame (`server.wire.framing`) is bounded before it is read. The whole has a time limit, however slowly the peer
talks. Nothing is encrypted: the network between the hosts must be private.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from server.config import Config
from server.errors import StartError, UnreachableError
from server.remote.agreement import Offer, Verdict
from server.wire.framing import FrameError, FrameParser, framed

HANDSHAKE_SECONDS = 5.0
KEY_VARIABLE = "POLYLOGIT_CLUSTER_KEY"

_COORDINATOR = b"polylogit coordinator"
_EXPERT = b"polylogit expert"
_NUMBER_BYTES = 32
_MAX_BYTES = 1 << 14
_MIN_KEY = 32
_IDLE_PROBE_SECONDS = 5
_PROBES = 3


Judge = Callable[[Offer], Verdict]
"""What a worker thinks of an offer."""


def load_key(config: Config) -> bytes:
    """The secret that the hosts share. Raises StartError if there is none or it is short."""
    if config.cluster_key_file is not None:
        source = f"cluster_key_file {config.cluster_key_file}"
        try:
            key = config.path(config.cluster_key_file).read_bytes().strip()
        except OSError as error:
            raise StartError(f"{source}: cannot be read: {error.strerror}") from None
    else:
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").encode().strip()
    if not key:
        raise StartError(
            f"an expert on another host needs a key that both hosts know: {KEY_VARIABLE} or cluster_key_file"
            " (make one: openssl rand -hex 32)"
        )
    if len(key) < _MIN_KEY:
        raise StartError(f"{source}: has {len(key)} characters, at least {_MIN_KEY} are needed")
    return key


def greet(peer: socket.socket, key: bytes, offer: Offer) -> None:
    """The coordinator's side. Raises UnreachableError, with `final` if trying again is of no use."""
    wire = _Wire(peer)
    try:
        mine = secrets.token_bytes(_NUMBER_BYTES)
        wire.send(mine)
        theirs = wire.number()
        wire.send(_proof(key, _COORDINATOR, mine, theirs))
        try:
            proof = wire.receive(_NUMBER_BYTES)
        except _Closed:
            raise UnreachableError("it does not accept this host's cluster key", final=True) from None
        if not hmac.compare_digest(proof, _proof(key, _EXPERT, mine, theirs)):
            raise UnreachableError("it does not know the cluster key", final=True)
        wire.send(msgspec.msgpack.encode(offer))
        verdict = msgspec.msgpack.decode(wire.receive(_MAX_BYTES), type=Verdict)
    except (OSError, FrameError, msgspec.DecodeError) as error:
        raise UnreachableError(_words(error)) from None
    if verdict.reason:
        raise UnreachableError(verdict.reason, final=verdict.final)


def welcome(peer: socket.socket, key: bytes, judge: Judge) -> Offer | None:
    """The worker's side: the offer of a coordinator that may stay, None for a visitor that left without a word (a
    health check). Raises UnreachableError otherwise; a peer that does not know the key has been told nothing then."""
    wire = _Wire(peer)
    try:
        try:
            theirs = wire.number()
        except _Closed:
            return None
        mine = secrets.token_bytes(_NUMBER_BYTES)
        wire.send(mine)
        proof = wire.receive(_NUMBER_BYTES)
        if not hmac.compare_digest(proof, _proof(key, _COORDINATOR, theirs, mine)):
            raise UnreachableError("does not know the cluster key")
        wire.send(_proof(key, _EXPERT, theirs, mine))
        offer = msgspec.msgpack.decode(wire.receive(_MAX_BYTES), type=Offer)
        verdict = judge(offer)
        wire.send(msgspec.msgpack.encode(verdict))
    except (OSError, FrameError, msgspec.DecodeError) as error:
        raise UnreachableError(_words(error)) from None
    if verdict.reason:
        raise UnreachableError(verdict.reason)
    return offer


def tune(peer: socket.socket) -> None:
    """Send small messages at once, and notice within some 20 seconds that the other host or the way to it is gone."""
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_PROBE_SECONDS)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _IDLE_PROBE_SECONDS)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _IDLE_PROBE_SECONDS * (_PROBES + 1))


class _Closed(OSError):
    """The peer has closed the connection."""


@dataclass(slots=True)
class _Wire:
    """Frames over a socket, all of them within one time limit."""

    peer: socket.socket
    """The connection."""
    deadline: float = 0.0
    """When the handshake must be over, on the clock of `time.monotonic`."""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + HANDSHAKE_SECONDS

    def send(self, data: bytes) -> None:
        self._limit()
        self.peer.sendall(framed(data))

    def number(self) -> bytes:
        """The peer's random number. Raises OSError, FrameError."""
        if len(number := self.receive(_NUMBER_BYTES)) != _NUMBER_BYTES:
            raise OSError("does not speak polylogit")
        return number

    def receive(self, max_bytes: int) -> bytes:
        """A frame of at most `max_bytes` bytes, and nothing of what follows it: that is a message. Raises OSError, and
        FrameError for a longer one."""
        frames = FrameParser(max_bytes)
        while (frame := frames.pop()) is None:
            self._limit()
            try:
                data = self.peer.recv(frames.missing())
            except ConnectionResetError:
                data = b""
            if not data:
                raise _Closed("closed the connection in the handshake")
            frames.feed(data)
        return frame

    def _limit(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.peer.settimeout(left)


def _proof(key: bytes, role: bytes, coordinators: bytes, experts: bytes) -> bytes:
    """Only who knows `key` can make it, for one role and one pair of numbers."""
    return hmac.new(key, role + coordinators + experts, hashlib.sha256).digest()


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no handshake within {HANDSHAKE_SECONDS:g} s"
    if isinstance(error, msgspec.DecodeError | FrameError):
        return "does not speak polylogit"
    return str(getattr(error, "strerror", None) or error)
