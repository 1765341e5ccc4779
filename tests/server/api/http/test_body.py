"""What is refused of a body, and what is read: an error object, never a 500, never a hang."""

from __future__ import annotations

import json
import time

import pytest

from tests.support.api.in_process import Served

CHAT = "/v1/chat/completions"
USER = '"messages": [{"role": "user", "content": "x"}]'
DEEP = [
    '"messages": [{"role": "user", "content": [{"type": %s}]}]',
    '"messages": [{"role": "user", "content": "x", "name": %s}]',
    '"messages": [{"role": "assistant", "tool_calls": [{"id": %s, "function": {"name": "f"}}]}]',
    f'{USER}, "tool_choice": "none", "tools": [{{"type": "function", "function": {{"name": "f", "parameters": %s}}}}]',
    f'{USER}, "response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {{"items": %s}}}}}}',
    *(f'{USER}, "{name}": %s' for name in ("fusion", "logit_bias", "stop", "tool_choice", "functions", "temperature")),
]


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


@pytest.mark.parametrize("content", ["a\x00b", "\U0001f600" * 100, "\ufdd0", "\u202e", "<|end|>" * 20, "\ue000"])
async def test_strange_text(api: Served, content: str) -> None:
    answer = await api.chat(messages=[{"role": "user", "content": content}])
    assert answer.status_code == 200
    assert list(content.encode()) == api.fake.submitted[0].prompts[0][2:-2]


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
