"""Experts on another host, all of them in this process: workers that listen on the loopback interface, a way to them
that can break, and a deployment that reaches them by it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any, Self

from server.config import Config
from server.errors import EngineError
from server.expert.process import serve_visitors
from server.expert.worker import Worker
from server.launch.sockets import bound
from server.remote.agreement import Terms, facts
from server.remote.listener import Listener
from server.wire.expert import ToExpert
from tests.support.coordinator.harness import Deployment, KilledError
from tests.support.fake_engine import HIDDEN, VOCABULARY, FakeEngine

KEY = b"k" * 32
_LOOK_SECONDS = 0.02


def write_models(directory: Path, names: str = "ab") -> None:
    """What `facts` reads of the models of a `Deployment` in `directory`."""
    config = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_size": HIDDEN,
        "eos_token_id": VOCABULARY - 1,
    }
    for name in names:
        (directory / name).mkdir(exist_ok=True)
        (directory / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (directory / name / "tokenizer.json").write_text(json.dumps({"name": name}), encoding="utf-8")


class Host(threading.Thread):
    """`polylogit expert` over a fake engine, listening on `port` of the loopback interface."""

    def __init__(self, engine: FakeEngine, config: Config, expert: int, port: int) -> None:
        super().__init__(daemon=True)
        self._engine, self._config, self._expert, self.port = engine, config, expert, port
        self._bound = bound("--listen", "127.0.0.1", port)
        self.listener = _KillableListener(
            self._bound.__enter__(),
            KEY,
            facts(config, config.expert_names[expert]),
            hang_seconds=config.limits.tick_seconds,
            killed=engine.killed,
        )
        self.terms: list[Terms] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            serve_visitors(self.listener, self._serve)
        except (EngineError, KilledError) as error:
            self.error = error
        finally:
            self.listener.close()
            self._bound.__exit__(None, None, None)

    def _serve(self, terms: Terms) -> None:
        self.terms.append(terms)
        length = terms.list_length
        Worker(self._engine, self.listener, expert=self._expert, top_k=length, projector=None).run()


class _KillableListener(Listener):
    def __init__(
        self, bound: socket.socket, key: bytes, facts: dict[str, str], *, hang_seconds: float, killed: threading.Event
    ) -> None:
        super().__init__(bound, key, facts, hang_seconds=hang_seconds)
        self._killed = killed

    def receive(self, timeout: float | None) -> ToExpert | None:
        while (message := super().receive(_LOOK_SECONDS)) is None:
            if self._killed.is_set():
                raise KilledError
        return message

    def dismiss(self) -> None:
        """After the coordinator that is served now, close."""
        self._admitted.put(None)


class Way:
    """The network: what comes to `port` goes on to `target`, until it is cut; while it is frozen, nothing passes."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def freeze(self) -> None:
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    def cut(self) -> None:
        """Break the connections that there are."""
        for end in self._ends:
            _shut(end)

    def close(self) -> None:
        self._open.set()
        _shut(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(5.0)
        for end in (self._listener, *self._ends):
            end.close()

    def _start(self, target: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            self._ends.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 5.0)
            except OSError:
                _shut(near)
                continue
            self._ends.append(far)
            self._start(self._carry, near, far)
            self._start(self._carry, far, near)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._open.wait()
                target.sendall(data)
        self._open.wait()
        _shut(source)
        _shut(target)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class TwoHosts(Deployment):
    """Expert a here, expert b on another host, by a `Way`. `host`: the one that another
    deployment has kept."""

    def __init__(
        self, directory: Path, engines: list[FakeEngine], *, host: Host | None = None, **settings: Any
    ) -> None:
        write_models(directory)
        (directory / "key").write_bytes(KEY)
        self._kept = host
        self._port = free_port() if host is None else host.port
        self.way = Way(self._port)
        address = f"127.0.0.1:{self.way.port}"
        super().__init__(
            directory, engines, expert={1: {"address": address}}, **{"cluster_key_file": "key", **settings}
        )

    @property
    def host(self) -> Host:
        host = self._workers[1]
        assert isinstance(host, Host)
        return host

    def start(self, expert: int, engine: FakeEngine | None = None) -> None:
        if expert == 0:
            super().start(expert, engine)
            return
        self.engines[expert] = engine or self.engines[expert]
        if self._kept is None:
            self._kept = Host(self.engines[expert], self.config, expert, self._port)
            self._kept.start()
        self._workers[expert], self._kept = self._kept, None

    def keep_host(self) -> Host:
        """The host, to outlive this deployment."""
        host = self.host
        self._workers[1] = None
        return host

    def lose(self, expert: int) -> None:
        """Wait for the worker to end by itself; the coordinator notices on its own what happens on another host."""
        if expert == 0:
            super().lose(expert)
            return
        host = self.host
        self.until(lambda: not host.is_alive())
        self._workers[expert] = None

    def __enter__(self) -> Self:
        self.start(1)
        return super().__enter__()

    def _close(self) -> bool:
        if self._workers[1] is not None:
            self.host.listener.dismiss()
        self.way.thaw()
        stopped = super()._close()
        self.way.close()
        return stopped
