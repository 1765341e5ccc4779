"""`polylogit serve` as its users run it: a process of its own, a configuration file, a port."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.support import processes

POLYLOGIT = Path(sys.executable).with_name("polylogit")
KEY = "none"
"""Sent with every request; servers without keys do not look at it."""
_READY = re.compile(r"(?:is ready on |\"url\":\")(http://127\.0\.0\.1:\d+)")
_START_SECONDS = 150.0
_STOP_SECONDS = 60.0

Value = TypeVar("Value")


def until(condition: Callable[[], Value], *, limit: float, what: str) -> Value:
    """The first true value of `condition`, asked again and again. Raises TimeoutError after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not so after {limit:g} s")
        time.sleep(0.02)
    return value


class Served:
    """A running server. Its temporary directory is its own, so that what it leaves behind can be seen."""

    def __init__(self, what: dict[str, Any] | list[str], environment: dict[str, str]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="e2e-"))
        self.sockets = self.directory / "tmp"
        self.sockets.mkdir()
        arguments = what if isinstance(what, list) else ["serve", str(self._written(what))]
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [POLYLOGIT, *arguments, "--port", "0"],
                stdout=output,
                stderr=errors,
                env={**os.environ, "TMPDIR": str(self.sockets), **environment},
            )
        self._seen: set[int] = set()

    def _written(self, data: dict[str, Any]) -> Path:
        file = self.directory / "polylogit.yaml"
        file.write_text(yaml.safe_dump(data), encoding="utf-8")
        return file

    @property
    def _output(self) -> Path:
        return self.directory / "stdout"

    @property
    def _errors(self) -> Path:
        return self.directory / "stderr"

    def wait_ready(self) -> None:
        """Return once it says that it is ready. Raises RuntimeError with its last words if it ends instead."""

        def announced() -> re.Match[str] | None:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode}: {self._errors.read_text()[-2000:]}")
            return _READY.search(self._output.read_text() + self.errors())

        self.url = until(announced, limit=_START_SECONDS, what="ready line")[1]
        self._seen |= self.descendants()
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=self.headers)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def chat(self, **body: Any) -> dict[str, Any]:
        """A greedy chat completion, unless `body` says otherwise. Raises httpx.HTTPStatusError."""
        return self._post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Sum 94 and 77."}], **body})

    def complete(self, **body: Any) -> dict[str, Any]:
        """A greedy text completion, unless `body` says otherwise. Raises httpx.HTTPStatusError."""
        return self._post("/v1/completions", {"prompt": "Sum 94", **body})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post(path, json={"temperature": 0, **body})
        response.raise_for_status()
        return dict(response.json())

    def metrics(self) -> dict[str, float]:
        """'name{label=value,...}' -> value."""
        response = self.http.get("/metrics")
        response.raise_for_status()
        return {
            sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def descendants(self) -> set[int]:
        return processes.descendants(self.process.pid)

    def experts(self) -> list[int]:
        """Processes that run an engine, in the order in which they were started."""
        found = processes.oldest_first(pid for pid in self.descendants() if processes.has_mapped(pid, "/vllm/"))
        self._seen |= set(found)
        return found

    def errors(self) -> str:
        return self._errors.read_text()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self._seen |= self.descendants()
        self.process.send_signal(signal.SIGTERM)

    def ended(self, limit: float = _STOP_SECONDS) -> int:
        """Its exit code once it has ended."""
        return self.process.wait(limit)

    def left_behind(self) -> list[str]:
        """Processes and files that have not gone soon after its end."""
        with contextlib.suppress(TimeoutError):
            until(lambda: not self._left(), limit=5, what="nothing left")
        return self._left()

    def _left(self) -> list[str]:
        alive = [f"{pid}: {processes.command(pid)}" for pid in self._seen if processes.alive(pid)]
        return alive + [str(path) for path in self.sockets.iterdir()]

    def clean_up(self) -> None:
        """Whatever happened, end what this server started and remove its files."""
        self._seen |= self.descendants()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self._seen:
            if processes.alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if hasattr(self, "http"):
            self.http.close()
            self.openai.close()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def serve(what: dict[str, Any] | list[str], environment: dict[str, str] | None = None) -> Iterator[Served]:
    """A ready server over a configuration's data, or of a command's arguments, with `environment` on top of ours. At
    the end it must leave in order, if it has not already."""
    server = Served(what, environment or {})
    try:
        server.wait_ready()
        yield server
        if server.process.poll() is None:
            server.terminate()
            assert server.ended() == 0, server.errors()[-2000:]
        assert not (left := server.left_behind()), left
    finally:
        server.clean_up()
