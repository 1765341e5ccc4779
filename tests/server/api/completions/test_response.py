"""Responses whose client leaves, or whose server ends; streams in which nothing is said for long."""

from __future__ import annotations

import asyncio
import json
import logging
import random

import httpx
import pytest

from tests.support.api.deployment import deployment, ids
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served, in_flight, served

CHAT = "/v1/chat/completions"


async def test_a_client_that_leaves_a_stream(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: list(b"x" * 400), pause=0.01)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 3}
    async with api.http.stream("POST", CHAT, json=body) as response:
        async for _ in response.aiter_bytes():
            break
    await api.fake.idle()
    assert [sorted(numbers) for numbers in api.fake.aborts] == [[sequence.id for sequence in api.fake.submitted]]


async def test_clients_that_leave_before_the_first_token(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: list(b"xx"), pause=30)
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            await api.http.post(
                CHAT,
                json={"messages": [{"role": "user", "content": "Hi"}], "stream": stream},
                timeout=httpx.Timeout(5, read=0.05),
            )
    await api.fake.busy(2)
    await api.fake.idle()
    await in_flight(api, 1)


async def test_two_hundred_clients_that_leave(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    api.fake.script = Script(tokens=lambda _: list(b"x" * 400), pause=0.01)
    dice = random.Random(0)

    async def leave() -> None:
        body = json.dumps({"prompt": "Hi", "stream": dice.random() < 0.5, "max_tokens": 400}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await asyncio.sleep(dice.uniform(0, 0.3))
        writer.transport.abort() if dice.random() < 0.5 else writer.close()

    await asyncio.gather(*(leave() for _ in range(200)))
    await asyncio.sleep(0.1)
    await api.fake.idle()
    await in_flight(api, 1)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_keep_alive_comments(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: ids("ab"), pause=0.8)
    text = (await api.chat(stream=True)).text
    assert ": keep-alive\n\n" in text and text.endswith("data: [DONE]\n\n")


async def test_draining_and_stopping(tmp_path) -> None:
    async with served(deployment(tmp_path)) as server:
        early = await server.chat()
        assert early.status_code == 503 and early.headers["retry-after"]
        assert (await server.http.get("/health/ready")).status_code == 503
        assert (await server.http.get("/health/live")).status_code == 200
        await server.wait_ready()
        server.fake.script = Script(tokens=lambda _: list(b"x" * 400), pause=0.02)
        running = asyncio.create_task(server.chat(stream=True))
        await server.fake.busy()
        await server.fake.status(ready=False, draining=True)
        async with asyncio.timeout(5):
            while (await server.http.get("/health/ready")).status_code != 503:
                await asyncio.sleep(0.01)
        late = await server.chat()
        assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
        await asyncio.sleep(0.1)
        await server.fake.stop()
        text = (await running).text
        assert '"overloaded_error"' in text and text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(server.task, 5)
