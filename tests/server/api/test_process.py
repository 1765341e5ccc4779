"""The api as the supervisor starts it: a process of its own that no signal ends, only the coordinator."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx

from tests.support.api.deployment import write_model
from tests.support.api.fake_coordinator import FakeCoordinator
from tests.support.api.process import start


async def test_serves_until_stop(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        fake = FakeCoordinator(f"{tmp_path}/api")
        running = asyncio.create_task(fake.run())
        process = start(tmp_path, listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.listen()
    try:
        await fake.status()
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            assert (await http.get("/health/live")).is_success
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
            body = {"messages": [{"role": "user", "content": "Hi"}]}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.json()["choices"][0]["message"]["content"] == "Hello, world!"
        await fake.stop()
        _, errors = await asyncio.to_thread(process.communicate, timeout=10)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()
        running.cancel()
        fake.close()


async def test_one_line_when_it_cannot_start(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        process = start(tmp_path, listener)
        _, errors = await asyncio.to_thread(process.communicate, timeout=20)
    assert process.returncode == 1
    assert errors.startswith("one line: ") and errors.count("\n") == 1
