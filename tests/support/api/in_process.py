"""The api process's own parts in the test's event loop: a real socket, a real uvicorn, a fake coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from server.api.completions.choices import ChoiceStream
from server.api.process import serve
from server.config import Config
from tests.support.api.deployment import ids
from tests.support.api.fake_coordinator import FakeCoordinator, Script


@dataclass
class Served:
    """A running server. `fake` stands for everything behind it."""

    port: int
    fake: FakeCoordinator
    config: Config
    http: httpx.AsyncClient
    openai: AsyncOpenAI
    task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def chat(self, **body: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "Hi"}], **body}
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"prompt": "Hi", **body})

    async def wait_ready(self) -> None:
        await self.fake.status()
        async with asyncio.timeout(5):
            while (await self.http.get("/health/ready")).status_code != 200:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def served(config: Config) -> AsyncIterator[Served]:
    """Serve `config` on a free port; not ready yet."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as listener:
        address = f"{directory}/api"
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)  # a client that does not read is soon felt
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        fake = FakeCoordinator(address)
        task = asyncio.create_task(serve(config, address, listener))
        running = asyncio.create_task(fake.run())
        url = f"http://127.0.0.1:{port}"
        http = httpx.AsyncClient(base_url=url, timeout=10)
        openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10)
        try:
            await _listening(http, task)
            yield Served(port, fake, config, http, openai, task)
        finally:
            await http.aclose()
            await openai.close()
            if not task.done():  # a bound socket without a peer would wait for one
                await fake.stop()
            await asyncio.wait_for(task, 10)
            running.cancel()
            fake.close()


def a_bug(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers have one token, and the next one raise."""
    push, (bad,) = ChoiceStream.push, ids("b")

    def pushed(choice: ChoiceStream, token: int, *others: Any) -> bool:
        if token == bad:
            raise ValueError("a secret of the server")
        return push(choice, token, *others)

    monkeypatch.setattr(ChoiceStream, "push", pushed)
    server.fake.script = Script(tokens=lambda _: ids("ab" * 100), pause=0.05)


async def in_flight(api: Served, count: int) -> None:
    """Wait until so many requests are, the one that asks among them."""
    async with asyncio.timeout(10):
        while f"polylogit_http_requests_in_flight {count}.0" not in (await api.http.get("/metrics")).text:
            await asyncio.sleep(0.02)


async def disconnected(api: Served) -> float:
    """Requests for completions whose client did not take the answer."""
    lines = (await api.http.get("/metrics")).text.splitlines()
    name = 'polylogit_http_requests_total{outcome="disconnected",route="/v1/completions"} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


async def _listening(http: httpx.AsyncClient, task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(10):
        while not task.done():
            with contextlib.suppress(httpx.TransportError):
                await http.get("/health/live")
                return
            await asyncio.sleep(0.02)
    task.result()
