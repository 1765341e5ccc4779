"""What only a deployment of its own can show: one expert that runs one sequence at a time behind a short queue, two
keys, short time limits, an origin, and a chat template that reads an argument."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import demo
from tests.support.refusals import refused
from tests.support.server_process import KEY, Served, serve, until

CHAT = "/v1/chat/completions"
OTHER_KEY = "Second-Key"
WRONG_KEYS = ["", "Bearer", "Bearer x", "Bearer NONE", "Bearer second-key", "Basic none", "none", "Bearer none none"]
ORIGIN = "https://page.example"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "ignore_eos": True}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 2}


def template() -> str:
    """The expert's own, unless the argument is there."""
    own = json.loads((demo.model("math") / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    asked = "{{ messages[-1].content }}|{{ enable_thinking }}|"
    return f"{{% if enable_thinking is defined %}}{asked}{{% else %}}{own}{{% endif %}}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "keys").write_text(f"{KEY}\n{OTHER_KEY}\n", encoding="utf-8")
    (folder / "template").write_text(template(), encoding="utf-8")
    http = {"keepalive_seconds": 0.1, "write_seconds": 1.0, "cors_origins": [ORIGIN]}
    data = demo.configuration(
        experts=["math"],
        limits={"sequences": 1, "queue": 2, "key_requests": 3},
        http={"api_keys_file": str(folder / "keys"), **http},
        # One thread: two would spin while they wait for each other and for the cores of those who ask.
        expert={"chat_template": str(folder / "template"), "cpus": [min(os.sched_getaffinity(0))]},
    )
    with serve(data) as server:
        yield server


def client(server: Served, key: str = KEY) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, headers={"authorization": f"Bearer {key}"}, timeout=120)


async def lines(client: httpx.AsyncClient, **body: Any) -> list[str]:
    """A stream to its end."""
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        return [line async for line in response.aiter_lines()]


async def waiting(server: Served, count: int) -> None:
    """Return once so many sequences are in the queue, behind one that runs."""

    def so() -> bool:
        metrics = server.metrics()
        return (metrics["polylogit_running_sequences"], metrics["polylogit_queued_sequences"]) == (1, count)

    await asyncio.to_thread(until, so, limit=60, what=f"{count} in the queue")


def sent_away(response: httpx.Response, status: int, kind: str) -> None:
    assert refused(response, status)["type"] == kind
    assert int(response.headers["retry-after"]) > 0


async def test_the_queue_and_the_key_have_limits_and_who_waits_sees_a_sign_of_life(server: Served) -> None:
    async with client(server) as one, client(server, OTHER_KEY) as other:
        running = [asyncio.create_task(lines(one, **LONG))]
        await waiting(server, 0)
        running += [asyncio.create_task(lines(one, **SHORT)) for _ in range(2)]
        await waiting(server, 2)
        sent_away(await one.post(CHAT, json=SHORT), 429, "rate_limit_error")
        sent_away(await other.post(CHAT, json=SHORT), 503, "overloaded_error")
        first, *queued = await asyncio.gather(*running)
    assert first[-2:] == ["data: [DONE]", ""]
    for stream in queued:
        assert stream.count(": keep-alive") > 1 and stream[-2:] == ["data: [DONE]", ""]


async def test_priority(server: Served) -> None:
    """The lower one goes first, though it came last."""
    done: list[int] = []

    async def ask(client: httpx.AsyncClient, priority: int) -> None:
        (await client.post(CHAT, json={**SHORT, "priority": priority})).raise_for_status()
        done.append(priority)

    async with client(server) as one:
        running = [asyncio.create_task(lines(one, **LONG))]
        await waiting(server, 0)
        for number, priority in enumerate((5, -5), start=1):
            running.append(asyncio.create_task(ask(one, priority)))
            await waiting(server, number)
        await asyncio.gather(*running)
    assert done == [-5, 5]


def test_chat_template_kwargs(server: Served) -> None:
    for value in ("low", "high"):
        body = {"messages": LONG["messages"], "chat_template_kwargs": {"enable_thinking": value}}
        tokens = server.http.post("/tokenize", json=body).json()["tokens"]
        assert bytes(tokens) == f"x|{value}|".encode()
        answer = server.chat(**SHORT, chat_template_kwargs={"enable_thinking": value}, return_token_ids=True)
        assert answer["prompt_token_ids"] == tokens


def test_keys(server: Served) -> None:
    for header in WRONG_KEYS:
        with httpx.Client(base_url=server.url, headers={"authorization": header} if header else {}) as client:
            for path in ("/v1/models", "/metrics", "/openapi.json", "/docs", "/nothing"):
                assert refused(client.get(path), 401)["type"] == "authentication_error"
            assert refused(client.post(CHAT, json=SHORT), 401)["code"] == "invalid_api_key"
            assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
    for key in (KEY, OTHER_KEY):
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert server.chat()["choices"][0]["message"]["content"] == "171"
    assert OTHER_KEY not in server.errors() and OTHER_KEY.lower() not in server.errors()


def test_other_origins(server: Served) -> None:
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
    }
    preflight = httpx.options(f"{server.url}{CHAT}", headers={"origin": ORIGIN, **asked})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, ORIGIN)
    answer = server.http.get("/v1/models", headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    foreign = httpx.options(f"{server.url}{CHAT}", headers={"origin": "https://other.example", **asked})
    assert (foreign.status_code, foreign.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "access-control-allow-origin" not in foreign.headers


def test_a_client_that_stops_reading(server: Served) -> None:
    """It asks for more than its socket and the server's can hold. The number in flight has the request that asks."""
    request = f"GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()

    def in_flight(count: int) -> bool:
        return server.metrics()["polylogit_http_requests_in_flight"] == count

    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client.sendall(request * 400)
        until(lambda: in_flight(2), limit=60, what="an answer that waits to be read")
        until(lambda: in_flight(1), limit=60, what="the client was cut off")
