"""Connections of hostile or unlucky clients: what they send has limits, and what they do not read is not kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket

import pytest

from tests.support.api.deployment import ids
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served, disconnected, in_flight

CHAT = "/v1/chat/completions"
TRAILED = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: "


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
