"""What one key may run and start: 429 beyond it, and other keys do not notice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.api.app import create_app
from server.api.client import EngineClient
from server.api.http.quotas import KeyLimited
from server.errors import ConfigError
from server.wire.api import ToApi
from server.wire.async_channel import AsyncChannel
from tests.support.api.deployment import deployment
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served, served


async def ask(server: Served, key: str, **body: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hi"}], **body}
    return await server.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})


def refused(answer: httpx.Response) -> bool:
    if answer.status_code == 200:
        return False
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "1" and "x-request-id" in answer.headers
    return True


async def test_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYLOGIT_API_KEYS", "one,two")
    async with served(deployment(tmp_path, limits={"key_requests": 2})) as server:
        await server.fake.status()
        server.fake.script = Script(tokens=lambda _: list(b"xx"), pause=30)
        running = [asyncio.create_task(ask(server, "one", stream=stream)) for stream in (False, True)]
        await server.fake.busy(2)
        assert refused(await ask(server, "one"))
        server.fake.script = Script()
        assert not refused(await ask(server, "two"))
        models = await server.http.get("/v1/models", headers={"authorization": "Bearer one"})
        assert models.status_code == 200
        for task in running:  # the clients leave
            task.cancel()
        await server.fake.idle()
        async with asyncio.timeout(5):
            while refused(await ask(server, "one")):
                await asyncio.sleep(0.01)


async def test_requests_a_minute() -> None:
    """Three, then one more every twenty seconds."""
    now = 100.0
    limited = KeyLimited(PlainTextResponse("served"), max_running=None, per_minute=3, clock=lambda: now)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"key": Headers(scope=scope)["key"]}
        await limited(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:

        async def codes(count: int, key: bytes = b"one", path: str = "/v1/completions") -> list[int]:
            return [(await client.post(path, headers={"key": key})).status_code for _ in range(count)]

        assert await codes(5) == [200, 200, 200, 429, 429]
        late = await client.post("/v1/completions", headers={"key": b"one"})
        assert late.headers["retry-after"] == "20"
        assert await codes(1, b"two") == await codes(1, path="/tokenize") == [200]
        now += 21
        assert await codes(2) == [200, 429]
        now += 3600
        assert await codes(4) == [200, 200, 200, 429]


async def test_limits_need_keys(tmp_path: Path) -> None:
    for limit in ("key_requests", "key_requests_per_minute"):
        with pytest.raises(ConfigError, match="key_requests"):
            create_app(deployment(tmp_path, limits={limit: 2}), EngineClient(AsyncChannel("", ToApi, bind=False)))
