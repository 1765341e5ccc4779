"""What tests of processes start instead of the real ones: small targets for fresh interpreters, and deployments of
them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server import logs
from server.config import Config, LoggingConfig, parse_config
from server.errors import EngineError, StartError
from server.placement import Placement
from server.wire.api import FromApi, ToApi
from server.wire.base import Stop
from server.wire.channel import Channel, endpoint
from server.wire.supervisor import (
    CoordinatorReady,
    Drain,
    Drained,
    FromSupervisor,
    RemoteNote,
    RestartExpert,
    ToSupervisor,
)
from tests.support import processes

SECONDS = 30.0


def config(directory: Path = Path(), models: Sequence[str] = ("stays", "stays"), **settings: Any) -> Config:
    """Of experts a, b, ..., whose models say what they do (see `expert`)."""
    experts = [{"name": name, "model": model} for name, model in zip("abcd", models, strict=False)]
    data = {"name": "fake", "experts": experts, "http": {"port": 0}, **settings}
    return parse_config(data, directory=directory)


def until(condition: Callable[[], bool]) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def everything_ended(directory: Path, earlier: set[int | None]) -> bool:
    """No expert that wrote its number runs any more, nor any other child that this process has started since."""
    pids = [int(path.read_text()) for path in directory.glob("*.pid")]
    since = {child.pid for child in multiprocessing.active_children()} - earlier
    return not since and not any(processes.alive(pid) for pid in pids)


# --- single processes ---


def explain() -> None:
    raise StartError("the model is not there")


def crash() -> None:
    raise ValueError("several\n  words\ton two lines")


def linger_with_closed_files(ready: str) -> None:
    """As a process does that is ending, while the system frees what it held."""
    os.closerange(3, 1024)
    linger(ready)


def linger(ready: str) -> None:
    """Say so with a file, then wait."""
    Path(ready).touch()
    time.sleep(SECONDS)


def write_and_abort() -> None:
    logs.configure(LoggingConfig(format="json"), "expert a")
    logging.getLogger("polylogit").info("a line")
    print("printed", flush=True)
    os.write(2, b"from C\n\nunfinished")
    os.kill(os.getpid(), signal.SIGKILL)


def raise_signal(number: int) -> None:
    signal.raise_signal(number)


# --- in place of `server.launch.served.run_server` ---


def announces(config: Path, gate: Path | None, announce: Connection) -> None:
    """The URL's path is this process's number."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    announce.send_bytes(f"http://127.0.0.1:1/{os.getpid()}".encode())
    time.sleep(SECONDS)


def refuses(config: Path, gate: Path | None, announce: Connection) -> None:
    explain()


def crashes(config: Path, gate: Path | None, announce: Connection) -> None:
    crash()


def is_killed(config: Path, gate: Path | None, announce: Connection) -> None:
    raise_signal(signal.SIGKILL)


def loads_for_ever(config: Path, gate: Path | None, announce: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(SECONDS)


# --- in place of a deployment's processes ---


def coordinator(config: Config, directory: Path) -> None:
    """Is ready at once, writes down what the supervisor says, and hands on `config.example_prompt`: an expert to be
    restarted as soon as everything runs, or a reason to die."""
    api: Channel[FromApi, ToApi] = Channel(endpoint(directory, "api"), FromApi, bind=True)
    control: Channel[FromSupervisor, ToSupervisor] = Channel(endpoint(directory, "control"), FromSupervisor, bind=True)
    if config.example_prompt == "coordinator dies":
        raise StartError("the experts' vocabularies differ")
    if config.example_prompt == "unreachable":
        control.send(RemoteNote(1, "10.0.0.2:8100: Connection refused"))
    elif config.example_prompt != "never ready":
        control.send(CoordinatorReady())
    if config.example_prompt == "restart a":
        control.send(RestartExpert(1, 7, "stale: there is no such generation"))
        control.send(RestartExpert(0, 0, "no answer for 60 s"))
    with (config.path("heard.txt")).open("a", encoding="utf-8") as heard:
        while True:
            if (message := control.receive(SECONDS)) is None:
                break
            print(message, file=heard, flush=True)
            control.flush()  # the supervisor is there: it can be told
            (directory / "ready").touch()
            match message:
                case Drain():
                    control.send(Drained())
                case Stop():
                    break
    api.send(Stop())
    (directory / "stopped").touch()
    api.close()
    control.close()


def api(config: Config, address: str, listener: object) -> None:
    channel: Channel[ToApi, FromApi] = Channel(address, ToApi, bind=False)
    channel.receive(SECONDS)
    channel.close()


def expert(config: Config, place: Placement, directory: Path, listener: object) -> None:
    """Dies as its model's name says: `at-once`, `always` after a while, `once` after a while; else lives."""
    model = config.experts[place.expert].model
    deadline = time.monotonic() + SECONDS
    config.path(f"{config.experts[place.expert].name}-{place.generation}.pid").write_text(str(os.getpid()))
    if model == "at-once":
        raise EngineError("out of memory")
    if model == "always" or (model == "once" and place.generation == 0):
        while not (directory / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # so that the supervisor knows it too
        raise EngineError("CUDA error")
    while not (directory / "stopped").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
