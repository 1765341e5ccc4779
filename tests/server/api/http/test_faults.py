"""What hostile or unlucky clients send, and what comes back: an error object, never a 500, never a hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import time

import httpx
import pytest

from tests.support.api.deployment import deployment, ids
from tests.support.api.fake import Script, failure
from tests.support.api.serving import Served, served

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"5", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 200_000, b'{"messages":' + b"[" * 200_000),
        *(b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": 1e999}', b'{"a": "\\ud800"}'),
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_bodies_that_are_no_request(api: Served, body: bytes) -> None:
    answer = await api.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_content_types(api: Served) -> None:
    assert (await api.http.post(CHAT, data={"messages": "x"})).status_code == 415
    gzip = await api.http.post(CHAT, content=b"x", headers={"content-encoding": "gzip"})
    assert gzip.status_code == 415 and gzip.json()["error"]["type"] == "invalid_request_error"


async def test_long_bodies(api: Served) -> None:
    declared = await api.http.post(CHAT, content=b"x" * 4_000_001)
    assert declared.status_code == 413 and "error" in declared.json()

    async def chunks():
        for _ in range(50):
            yield b" " * 100_000

    chunked = await api.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    assert chunked.status_code == 413 and "error" in chunked.json()


async def raw(api: Served, data: bytes, *, read: int = 1000) -> bytes:
    """What comes back when `data` is written to the bare socket."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            return await reader.read(read)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_headers(api: Served) -> None:
    start = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
    many = start + b"".join(b"a%d: b\r\n" % number for number in range(300)) + b"\r\n"
    assert (await raw(api, many)).startswith((b"HTTP/1.1 4", b""))
    assert b"200" not in (await raw(api, many))[:20]
    long = start + b"a: " + b"b" * 5_000_000 + b"\r\n\r\n"
    assert b"200" not in (await raw(api, long))[:20]
    assert b" 200 " in (await raw(api, start + b"\r\n"))[:20]


async def test_a_header_that_never_ends(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.http.server._HEADER_SECONDS", 0.2)
    assert await raw(api, b"GET / HTTP/1.1\r\nhost: ") == b""


TRAILED = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: "


@pytest.mark.parametrize("path", [b"/v1/completions", b"/health/live"])
async def test_trailers_are_short(api: Served, path: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(TRAILED % path)
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            writer.write(b"b" * 100_000)
            await writer.drain()
    assert writer.transport.is_closing()
    with contextlib.suppress(ConnectionError):
        assert (await reader.read()).count(b"HTTP/1.1") <= 1
    writer.close()


async def test_trailers_are_no_headers(api: Served) -> None:
    answer = await raw(api, TRAILED % CHAT.encode() + b"1\r\n" + b"y: z\r\n" * 200 + b"\r\n")
    assert b" 400 " in answer[:20] and b"messages" in answer


@pytest.mark.parametrize(
    "rest", [TRAILED % b"/health/live", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"]
)
async def test_a_body_that_never_ends(api: Served, monkeypatch: pytest.MonkeyPatch, rest: bytes) -> None:
    """Its request may be answered long before."""
    monkeypatch.setattr("server.api.http.server._BODY_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(rest)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            assert (await reader.read()).count(b"HTTP/1.1") == 1
    writer.close()


async def test_the_next_request_is_not_awaited_while_one_is_answered(
    api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is its fault told in the middle of that answer."""
    monkeypatch.setattr("server.api.http.server._HEADER_SECONDS", 0.1)
    api.fake.script = Script(tokens=lambda _: ids("abcdefgh"), pause=0.1)
    body = json.dumps({"prompt": "Hi", "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(head + body + b"GET /health/live HTTP/1.1\r\na: ")
    assert b"[DONE]" in await reader.readuntil(b"\r\n0\r\n\r\n")
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize("content", ["a\x00b", "\U0001f600" * 100, "\ufdd0", "\u202e", "<|end|>" * 20, "\ue000"])
async def test_strange_text(api: Served, content: str) -> None:
    answer = await api.chat(messages=[{"role": "user", "content": content}])
    assert answer.status_code == 200
    assert list(content.encode()) == api.fake.submitted[0].prompts[0][2:-2]


USER = '"messages": [{"role": "user", "content": "x"}]'
DEEP = [
    '"messages": [{"role": "user", "content": [{"type": %s}]}]',
    '"messages": [{"role": "user", "content": "x", "name": %s}]',
    '"messages": [{"role": "assistant", "tool_calls": [{"id": %s, "function": {"name": "f"}}]}]',
    f'{USER}, "tool_choice": "none", "tools": [{{"type": "function", "function": {{"name": "f", "parameters": %s}}}}]',
    f'{USER}, "response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {{"items": %s}}}}}}',
    *(f'{USER}, "{name}": %s' for name in ("fusion", "logit_bias", "stop", "tool_choice", "functions", "temperature")),
]


@pytest.mark.parametrize("body", DEEP, ids=lambda body: body[-40:])
async def test_no_depth_breaks_anything(api: Served, body: str) -> None:
    """Up to where the body itself is refused: others may go through it with less room than its reader had."""
    for levels in (*range(200, 900, 100), *range(940, 980)):
        for start, end in (('{"a":', "}"), ("[", "]")):
            raw = "{" + body % (start * levels + "1" + end * levels) + "}"
            answer = await api.http.post(CHAT, content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (levels, answer.text)


@pytest.mark.parametrize(("lists", "status"), [(2, 200), (8000, 400)])
async def test_what_arguments_of_calls_hold_counts_together(api: Served, lists: int, status: int) -> None:
    """JSON in strings, eight calls of it: few enough each, too much in all."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"[": [[]] * lists})}}
    user = {"role": "user", "content": "x"}
    answer = await api.chat(messages=[user, {"role": "assistant", "tool_calls": [call] * 8}, user])
    assert answer.status_code == status
    if status == 400:
        error = answer.json()["error"]
        assert (error["param"], "more than 50000 arrays and objects" in error["message"]) == ("messages", True)


async def test_a_megabyte_in_one_word(api: Served) -> None:
    start = time.perf_counter()
    answer = await api.chat(messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert answer.status_code == 400 and time.perf_counter() - start < 1


async def test_routes_that_are_not_there(api: Served) -> None:
    for path in ("/playground", "/nothing", "/v1/nothing", "/v1/models/nothing"):
        answer = await api.http.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    answer = await api.http.get(CHAT)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and "error" in answer.json()


async def test_request_ids(api: Served) -> None:
    answer = await api.http.get("/version", headers={"x-request-id": "a-b_c.9"})
    assert answer.headers["x-request-id"] == "a-b_c.9"
    for bad in ("a b", "x" * 129, "é".encode(), ""):
        answer = await api.http.get("/version", headers={"x-request-id": bad})
        assert len(answer.headers["x-request-id"]) == 32
    assert len((await api.http.get("/nothing")).headers["x-request-id"]) == 32
    answer = await api.chat()
    assert answer.json()["id"] == f"chatcmpl-{answer.headers['x-request-id']}"


async def test_an_expert_is_lost(api: Served) -> None:
    api.fake.script = Script(ended=failure())
    answer = await api.chat()
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the expert 'math' was lost"
    lines = (await api.chat(stream=True)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[-3].removeprefix("data: "))["error"]["type"] == "server_error"


async def test_a_full_queue(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: [], ended=failure("overloaded", "the queue is full"))
    for stream in (False, True):
        answer = await api.chat(stream=stream, n=2)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "overloaded_error"
    await api.fake.idle()


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


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_stops_reading(api: Served, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    """Its socket holds little, the server's no more than a block: both ends are full before the answer is out."""
    api.fake.script = Script(tokens=lambda _: list(b"abcdefgh" * 25), pause=0.001)
    body = json.dumps({"prompt": "Hi", "stream": stream, "n": 16, "max_tokens": 200, "logprobs": 20}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    gone = await disconnected(api)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", api.port))
        client.sendall(head % len(body) + body)
        async with asyncio.timeout(20):
            while await disconnected(api) == gone:
                await asyncio.sleep(0.05)
    assert api.fake.submitted and not api.fake.running
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_client_that_asks_on_and_reads_nothing(api: Served) -> None:
    """Every answer waits for the one before it to be read, whatever it is."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", api.port))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
        await in_flight(api, 2)
        await in_flight(api, 1)


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


async def test_keys(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("file-key\n\n")
    monkeypatch.setenv("POLYLOGIT_API_KEYS", "First-Key, second-key")
    http = {"api_keys_file": "keys", "cors_origins": ["https://page.example"]}
    async with served(deployment(tmp_path, http=http)) as server:
        await server.fake.status()
        for key in ("First-Key", "second-key", "file-key"):
            assert (await _models(server, f"Bearer {key}")).status_code == 200
        for header in (
            "",
            "Bearer",
            "Bearer x",
            "Bearer first-key",
            "Basic First-Key",
            "First-Key",
            "Bearer é",
        ):
            answer = await _models(server, header)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        assert (await server.http.get("/health/live")).status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json", "/nothing", "/healthy"):
            assert (await server.http.get(path)).status_code == 401
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        asked = {"access-control-request-headers": "authorization, x-stainless-lang, x-stainless-os"}
        preflight = await server.http.options(CHAT, headers=headers | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        for wrong in ({"origin": "https://other.example"}, {"access-control-request-method": "DELETE"}):
            refused = await server.http.options(CHAT, headers=headers | wrong)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


async def _models(server: Served, header: str) -> httpx.Response:
    return await server.http.get("/v1/models", headers={"authorization": header.encode()} if header else {})


async def test_no_cors_unless_configured(api: Served) -> None:
    answer = await api.http.get("/version", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in answer.headers
