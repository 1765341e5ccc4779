"""Another host: an expert's worker over a fake engine, behind a real door on a loopback port, in a thread."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Self

from server.config import Config
from server.errors import EngineError
from server.expert.process import serve_visitors
from server.expert.worker import Worker
from server.remote.agreement import facts
from server.remote.door import Door
from server.remote.handshake import load_key
from tests.fakes import HIDDEN, VOCABULARY, FakeEngine

KEY = "a key that both hosts know, long enough"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_models(directory: Path, *names: str) -> None:
    """Model directories with all that both hosts look at."""
    for name in names:
        (directory / name).mkdir(exist_ok=True)
        described = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "max_position_embeddings": 2048}
        (directory / name / "config.json").write_text(json.dumps(described))
        (directory / name / "tokenizer.json").write_text("{}")
        (directory / name / "model.safetensors").write_bytes(name.encode() * 100_000)


class Site:
    """Runs expert `expert` of `config` on the port of its address."""

    def __init__(self, config: Config, expert: int, engine: FakeEngine) -> None:
        chosen = config.experts[expert]
        host, _, port = str(chosen.address).rpartition(":")
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host, int(port)))
        self.engine = engine
        self.door = Door(self._listener, load_key(config), facts(config, chosen.name), hang_seconds=60)
        self._config, self._expert = config, expert
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As kill -9 of its process looks from outside."""
        self.engine.killed.set()
        self.engine.behaviour.hold.set()
        self.door.close()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def cut(self) -> None:
        """The connection breaks, the worker lives."""
        assert self.door._served is not None
        self.door._served.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            serve_visitors(self.door, self._serve)
        except EngineError:
            assert self.engine.killed.is_set()

    def _serve(self) -> None:
        retain = self._config.missing == "exact"
        top_k = self._config.top_k
        Worker(self.engine, self.door, expert=self._expert, top_k=top_k, projector=None, retain=retain).run()
