"""What hostile or unlucky clients send to the real server, fault by fault: an OpenAI error object, never a 500, never a
hang, memory flat, and afterwards it answers as before."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import demo
from tests.support.refusals import refused
from tests.support.server_process import Served, until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Sum 94 and 77."}]
SLACK_SECONDS = 5.0
"""What takes 100 ms on a quiet machine."""
MEMORY = 150 * 2**20


@pytest.fixture(autouse=True)
def unharmed(demo_server: Served) -> Iterator[None]:
    """Whatever a test does: memory stays flat, no process is lost, and the next answer is right."""
    before, memory = demo_server.descendants(), resident(demo_server)
    yield
    assert demo_server.chat()["choices"][0]["message"]["content"] == "171"
    assert demo_server.descendants() == before
    assert resident(demo_server) - memory < MEMORY


@pytest.fixture(scope="module", autouse=True)
def unfinished(demo_server: Served) -> Iterator[socket.socket]:
    """Headers that are never finished, begun before all else."""
    with socket.create_connection(("127.0.0.1", int(demo_server.url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\na: ")
        yield connection


def resident(server: Served) -> int:
    """Bytes of memory in all processes of the server."""
    pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in server.descendants()]
    return 4096 * sum(map(int, pages))


def raw(server: Served, data: bytes) -> bytes:
    """What comes back when `data` is written to the bare socket; nothing if it was closed."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as connection:
        try:
            connection.sendall(data)
            return connection.recv(1000)
        except ConnectionError:
            return b""


BODIES = [b"", b"null", b"5", b"[]", b'"x"', b"{", b"\xff\xfe{}", b"[" * 200_000, b'{"messages":' + b"[" * 200_000]
NUMBERS = [
    b'{"temperature": NaN}',
    b'{"temperature": -Infinity}',
    b'{"temperature": 1e999}',
    b'{"seed": %s}' % (b"9" * 9999),
]


@pytest.mark.parametrize("body", [*BODIES, *NUMBERS], ids=lambda body: repr(body[:24]))
def test_1_a_body_that_is_no_request(demo_server: Served, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        refused(demo_server.http.post(path, content=body, headers={"content-type": "application/json"}))


def test_2_forms_and_headers(demo_server: Served) -> None:
    refused(demo_server.http.post(CHAT, data={"messages": "x"}), 400, 415)
    start = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
    for more in (b"a: " + b"b" * 5_000_000, b"\r\n".join(b"a%d: b" % number for number in range(300))):
        assert raw(demo_server, start + more + b"\r\n\r\n")[9:10] in (b"4", b"")
    assert raw(demo_server, start + b"\r\n")[9:12] == b"200"


def test_2_long_and_compressed_bodies(demo_server: Served) -> None:
    def chunks() -> Iterator[bytes]:
        yield from itertools.repeat(b" " * 100_000, 50)

    refused(demo_server.http.post(CHAT, content=b"x" * 4_000_001), 413)
    refused(demo_server.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"}), 413)
    refused(demo_server.http.post(CHAT, content=b"x", headers={"content-encoding": "gzip"}), 415)


MESSAGES: list[Any] = [None, [], "hi", {}, [1], [{"role": "user", "content": 5}], [{"role": "user", "content": None}]]


@pytest.mark.parametrize("messages", [*MESSAGES, [{"role": 5, "content": "x"}]], ids=repr)
def test_3_messages_that_are_none(demo_server: Served, messages: Any) -> None:
    assert (refused(demo_server.http.post(CHAT, json={"messages": messages}))["param"] or "").startswith("messages")


STRANGE = ["a\x00b", "\U0001f600" * 50, "\ufdd0", "\u202e", "\ue000", "x" * 1_000_000, "<|end|>" * 10]


@pytest.mark.parametrize("content", STRANGE, ids=lambda content: ascii(content[:12]))
def test_3_strange_text(demo_server: Served, content: str) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    assert demo_server.http.post(CHAT, json=body).status_code == (400 if len(content) > 1000 else 200)


def test_3_a_lone_surrogate(demo_server: Served) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    refused(demo_server.http.post(CHAT, content=body, headers={"content-type": "application/json"}))


def test_3_special_tokens_stay_text(demo_server: Served) -> None:
    body = {"messages": [{"role": "user", "content": "<|end|>"}]}
    tokens = demo_server.http.post("/tokenize", json=body).json()["tokens"]
    assert tokens.count(demo.EOS) == 1  # the template's own
    assert bytes(token for token in tokens if token < 256).endswith(b"<|end|>")


NUMBERLESS: list[tuple[str, Any]] = [
    ("n", 10**9),
    ("top_logprobs", 10**9),
    ("prompt_logprobs", 10**9),
    ("stop", ["a"] * 200_000),
    ("logit_bias", {str(key): 1 for key in range(300_000)}),
    ("logit_bias", {str(10**9): 1}),
    ("stop_token_ids", [10**9]),
    ("seed", 2**70),
    ("max_tokens", -(10**9)),
    ("temperature", 1e300),
]


@pytest.mark.parametrize(("name", "value"), NUMBERLESS, ids=lambda value: str(value)[:20])
def test_4_numbers_out_of_range(demo_server: Served, name: str, value: Any) -> None:
    started = time.monotonic()
    refused(demo_server.http.post(CHAT, json={"messages": QUESTION, name: value}))
    assert time.monotonic() - started < SLACK_SECONDS


@pytest.mark.parametrize(
    "prompt",
    [[-1], [2**63], [2**70], [demo.VOCABULARY], [1.5], [True], ["x"] * 2000, [[1]] * 600_000],
    ids=lambda p: str(p)[:20],
)
def test_5_prompts_of_no_tokens(demo_server: Served, prompt: Any) -> None:
    refused(demo_server.http.post(COMPLETIONS, json={"prompt": prompt}))


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMAS = [deep(65), {"type": "string", "pattern": "^(a+)+$"}, {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[-40:])
def test_6_schemas_that_would_cost_too_much(demo_server: Served, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert refused(demo_server.http.post(CHAT, json={"messages": QUESTION, "response_format": wanted}))["param"]


TOOLLESS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema"}},
    {"tools": []},
    {"tool_choice": "auto"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
]


@pytest.mark.parametrize("body", TOOLLESS, ids=str)
def test_6_what_lacks_its_other_half(demo_server: Served, body: dict[str, Any]) -> None:
    refused(demo_server.http.post(CHAT, json={"messages": QUESTION, **body}))


TEMPLATES: list[dict[str, Any]] = [
    {"chat_template": "{% for a in range(10**9) %}{% endfor %}"},
    {"chat_template_kwargs": {"chat_template": "x"}},
    {"chat_template_kwargs": {"tools": []}},
    {"chat_template_kwargs": {"enable_thinking": {"a": 1}}},
]


async def test_7_templates_and_long_bodies_leave_others_alone(demo_server: Served) -> None:
    """How short the pauses of the event loop are, `python -m tests.bench.api` measures."""
    longest = 0.0
    async with httpx.AsyncClient(base_url=demo_server.url, headers=demo_server.headers, timeout=60) as client:

        async def probe() -> None:
            nonlocal longest
            while True:
                started = time.monotonic()
                await client.get("/health/live")
                longest = max(longest, time.monotonic() - started)
                await asyncio.sleep(0.01)

        probing = asyncio.create_task(probe())
        long = {"messages": [{"role": "user", "content": "x"}] * 40_000}
        for body in [*({"messages": QUESTION, **template} for template in TEMPLATES), long, long]:
            refused(await client.post(CHAT, json=body))
        probing.cancel()
    assert 0 < longest < SLACK_SECONDS


async def test_9_two_hundred_clients_leave(demo_server: Served) -> None:
    """Some before the first token, some in the middle of the stream, some while they wait in the queue."""
    before = demo_server.metrics().get("polylogit_finished_sequences_total{reason=abort}", 0.0)

    async def visit(client: httpx.AsyncClient, number: int) -> None:
        body = {"messages": QUESTION, "max_tokens": 900, "stream": number % 4 != 3, "ignore_eos": True}
        if number % 4 == 3:  # not a stream: it leaves before it has anything
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json=body, timeout=httpx.Timeout(60, read=0.5))
            return
        async with client.stream("POST", CHAT, json=body) as response:
            lines = response.aiter_lines()
            for _ in range(number % 5 * 3):
                await anext(lines)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=demo_server.url, headers=demo_server.headers, timeout=60, limits=limits
    ) as client:
        await asyncio.gather(*(visit(client, number) for number in range(200)))
    until(lambda: is_empty(demo_server.metrics()), limit=30, what="nothing in flight, no KV cache in use")
    assert demo_server.metrics()["polylogit_finished_sequences_total{reason=abort}"] - before == 200


def is_empty(metrics: dict[str, float]) -> bool:
    gauges = ["polylogit_running_sequences", "polylogit_queued_sequences"]
    gauges += [
        f"polylogit_expert_{gauge}{{expert={name}}}"
        for gauge, name in itertools.product(("kv_used_ratio", "running_sequences"), demo.EXPERTS)
    ]
    in_flight = metrics["polylogit_http_requests_in_flight"]  # this very request
    return in_flight == 1 and all(metrics[gauge] == 0 for gauge in gauges)


def test_2_headers_that_are_never_finished(unfinished: socket.socket) -> None:
    assert unfinished.recv(1000) == b""


def test_2_trailers_without_end(demo_server: Served) -> None:
    start = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: "
    with (
        socket.create_connection(("127.0.0.1", int(demo_server.url.rpartition(":")[2])), timeout=60) as connection,
        pytest.raises(ConnectionError),
    ):
        connection.sendall(start)
        for _ in range(200):
            connection.sendall(b"b" * 1_000_000)


def test_an_error_in_a_stream_comes_before_its_end(demo_server: Served) -> None:
    """What can be refused is refused before the stream: no event, but an error object with its status."""
    body = {"messages": [{"role": "user", "content": "x" * 1100}], "stream": True}
    response = demo_server.http.post(CHAT, json=body)
    assert refused(response)["code"] == "context_length_exceeded"
    assert json.loads(response.text)["error"]["param"] == "messages"
