"""The API host's side: connects to the worker of an expert on another host, in a thread, and again whenever it is
asked to. The API host listens to nobody but HTTP clients.
"""

from __future__ import annotations

import queue
import socket
import threading
import time

from server.config import Config, parse_address
from server.errors import UnreachableError
from server.remote.agreement import Offer, offer
from server.remote.handshake import greet, load_key, tune

_CONNECT_SECONDS = 5.0
_MIN_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 5.0
_AGAIN_SECONDS = 1.0
"""A worker whose connection ended is not reached again sooner, so that one that always leaves keeps nobody busy."""


class Dialer:
    """Reaches the worker at `address`. Never blocks its caller."""

    def __init__(self, address: str, key: bytes, offer: Offer) -> None:
        self.address = address
        self._key = key
        self._offer = offer
        self._outcomes: queue.SimpleQueue[socket.socket | UnreachableError] = queue.SimpleQueue()
        self._trying = False
        self._reached_at = -_AGAIN_SECONDS
        self._closed = threading.Event()
        self._ending = threading.Lock()

    def reach(self) -> socket.socket | None:
        """The connection, once there is one; until then it is tried again and again. Raises UnreachableError, once for
        each attempt that failed."""
        if not self._trying:
            self._trying = True
            threading.Thread(target=self._try, name=f"reach {self.address}", daemon=True).start()
        try:
            outcome = self._outcomes.get_nowait()
        except queue.Empty:
            return None
        if isinstance(outcome, UnreachableError):
            raise outcome
        self._trying = False
        self._reached_at = time.monotonic()
        return outcome

    def dial(self) -> socket.socket:
        """A connection to a worker that knows the key and fits. Raises UnreachableError."""
        try:
            peer = socket.create_connection(parse_address(self.address), _CONNECT_SECONDS)
        except (OSError, UnicodeError) as error:
            raise UnreachableError(f"{self.address}: {getattr(error, 'strerror', None) or error}") from None
        try:
            greet(peer, self._key, self._offer)
            tune(peer)
        except (OSError, UnreachableError) as error:
            peer.close()
            raise UnreachableError(f"{self.address}: {error}", final=getattr(error, "final", False)) from None
        return peer

    def close(self) -> None:
        """Stop trying; an attempt that is under way ends within its time limits."""
        with self._ending:
            self._closed.set()
            while not self._outcomes.empty():
                if isinstance(outcome := self._outcomes.get_nowait(), socket.socket):
                    outcome.close()

    def _try(self) -> None:
        pause = _MIN_PAUSE_SECONDS
        self._closed.wait(max(0.0, self._reached_at + _AGAIN_SECONDS - time.monotonic()))
        while not self._closed.is_set():
            try:
                peer = self.dial()
            except UnreachableError as error:
                self._outcomes.put(error)
            else:
                with self._ending:
                    peer.close() if self._closed.is_set() else self._outcomes.put(peer)
                return
            self._closed.wait(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)


def dialers(config: Config) -> dict[int, Dialer]:
    """Expert -> how it is reached, for those on other hosts. Raises StartError if they cannot be reached from here."""
    remote = [(index, expert) for index, expert in enumerate(config.experts) if expert.address is not None]
    key = load_key(config) if remote else b""
    return {index: Dialer(str(expert.address), key, offer(config, expert.name)) for index, expert in remote}
