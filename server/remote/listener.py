"""The worker's side of an expert that runs on another host than the coordinator: whose connection is accepted, and the
conversation over it. One coordinator at a time; the next may come when the connection to it has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import threading
import time

from server.errors import UnreachableError
from server.remote.agreement import Offer, Terms, Verdict, compare
from server.remote.handshake import tune, welcome
from server.wire.base import Stop
from server.wire.channel import ConnectedChannel
from server.wire.expert import FromExpert, ToExpert

log = logging.getLogger("polylogit")

_MAX_HANDSHAKES = 16
"""At the same time; whoever comes then is refused at once."""
_LOOK_SECONDS = 0.2


class Listener:
    """Lets coordinators in at a bound socket from `open` on, in a thread.

    As a `CoordinatorLink` it is one coordinator's, from `admit` to the `Stop` that `receive` returns when that one says
    so or has gone; what is sent after that goes nowhere. An engine that does not notice within `hang_seconds` that its
    coordinator has gone hangs: this process then ends, to be started again.
    """

    def __init__(self, bound: socket.socket, key: bytes, facts: dict[str, str], *, hang_seconds: float) -> None:
        self._socket = bound
        self._key = key
        self._facts = facts
        self._hang_seconds = hang_seconds
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        self._admitted: queue.SimpleQueue[tuple[socket.socket, Terms] | None] = queue.SimpleQueue()
        self._vacant = threading.Lock()
        self._served: socket.socket | None = None
        self._gone_since: float | None = None
        self._channel: ConnectedChannel[ToExpert, FromExpert] | None = None
        self._closed = False

    def open(self) -> None:
        """Let coordinators come."""
        self._socket.listen()
        log.info("waiting for a coordinator on %s:%s", *self._socket.getsockname()[:2])
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def admit(self) -> Terms | None:
        """Wait for the next coordinator: what it wishes; None once this is closed."""
        if (admitted := self._admitted.get()) is None:
            return None
        peer, terms = admitted
        self._channel = ConnectedChannel(peer, ToExpert)
        return terms

    def send(self, message: FromExpert) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def receive(self, timeout: float | None) -> ToExpert | None:
        """The coordinator's next message, or None after `timeout` seconds; `Stop` when it has gone."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._channel is not None and not self._channel.ended:
            left = _LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - time.monotonic())
            message = self._channel.receive(max(0.0, left))
            if isinstance(message, Stop):
                break
            if message is not None or (deadline is not None and time.monotonic() >= deadline):
                return message
        self._part()
        return Stop()

    def close(self) -> None:
        """End the conversation and let nobody in any more."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # not yet opened
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._part()
        self._admitted.put(None)

    def _part(self) -> None:
        if self._channel is not None:
            log.info("the coordinator has gone")
            self._channel.close()
            self._channel = None
            self._vacate()

    def _vacate(self) -> None:
        self._served = self._gone_since = None
        self._vacant.release()

    # --- in threads of their own ---

    def _listen(self) -> None:
        while not self._closed:
            try:
                peer, address = self._socket.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("cannot accept connections: %s", error.strerror)
                    time.sleep(_LOOK_SECONDS)
                continue
            if self._handshakes.acquire(blocking=False):
                threading.Thread(target=self._meet, args=(peer, address[0]), daemon=True).start()
            else:
                peer.close()

    def _meet(self, peer: socket.socket, host: str) -> None:
        """Let in who knows the key, fits, and finds the place vacant."""
        taken = False

        def judge(offer: Offer) -> Verdict:
            nonlocal taken
            verdict = compare(offer.facts, self._facts)
            taken = not verdict.reason and self._vacant.acquire(blocking=False)
            return verdict if verdict.reason or taken else Verdict("it serves another coordinator", final=False)

        try:
            if (offer := welcome(peer, self._key, judge)) is not None:
                tune(peer)
                log.info("serving the coordinator on %s", host)
                self._served = peer
                self._admitted.put((peer, offer.terms))
                return
        except (OSError, UnreachableError) as error:
            log.warning("refused %s: %s", host, error)
            if taken:
                self._vacate()
            else:
                self._look_for_a_hang()
        finally:
            self._handshakes.release()
        peer.close()

    def _look_for_a_hang(self) -> None:
        """The worker itself cannot, in the middle of its engine's step."""
        if (served := self._served) is None:
            return
        poller = select.poll()
        with contextlib.suppress(ValueError):  # just closed: it has noticed
            poller.register(served, select.POLLRDHUP)
        if not poller.poll(0):
            return
        if self._gone_since is None:
            self._gone_since = time.monotonic()
        elif time.monotonic() - self._gone_since > self._hang_seconds:
            log.error("the engine hangs: it has not noticed for %g s that its coordinator has gone", self._hang_seconds)
            os._exit(1)
