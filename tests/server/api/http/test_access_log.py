"""The line of each request: its id, what it cost and how it ended, and nothing of what it said."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.http.middleware import Observed
from server.logs import JsonLines
from server.metrics.api import ApiMetrics
from tests.support.api.deployment import ids
from tests.support.api.fake_coordinator import Script, failure
from tests.support.api.in_process import Served, a_bug

PROMPT = "a most secret question"


class Lines:
    """What `polylogit` loggers write while a test runs."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def __call__(self, request_id: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        return [line for line in lines if line.get("request_id") == request_id]

    @property
    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, stream = logging.getLogger("polylogit"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines("api"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield Lines(stream)
    logger.removeHandler(handler)
    logger.setLevel(level)


async def post(api: Served, request_id: str, **body: Any) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], **body}
    await api.http.post("/v1/chat/completions", json=body, headers={"x-request-id": request_id})


@pytest.mark.parametrize("stream", [False, True])
async def test_answered(api: Served, lines: Lines, stream: bool) -> None:
    await post(api, "r", stream=stream, model="duo:math")
    (line,) = lines("r")
    assert line.pop("seconds") > 0 and line.pop("time")
    assert line == {
        **{"level": "info", "process": "api", "logger": "polylogit.api", "message": "request", "request_id": "r"},
        **{"method": "POST", "route": "/v1/chat/completions", "status": 200, "outcome": "ok", "model": "duo:math"},
        **{"prompt_tokens": len(PROMPT) + 4, "completion_tokens": 14, "finish_reasons": ["stop"]},
    }
    assert PROMPT not in lines.text and "Hello, world" not in lines.text


async def test_refused(api: Served, lines: Lines) -> None:
    """What a refusal quotes of the request is not logged."""
    await post(api, "r", model=PROMPT)
    (line,) = lines("r")
    assert (line["status"], line["outcome"], line["error"]) == (404, "client_error", "model_not_found")
    await post(api, "s", temperature=PROMPT)
    assert lines("s")[0]["error"] == "invalid_request_error"
    assert PROMPT not in lines.text


async def test_failed_in_the_middle(api: Served, lines: Lines) -> None:
    """The status was sent as 200 long before."""
    api.fake.script = Script(tokens=lambda _: ids("half"), ended=failure())
    await post(api, "r", stream=True)
    (line,) = lines("r")
    assert (line["status"], line["outcome"], line["error"]) == (200, "server_error", "the expert 'math' was lost")
    assert line["completion_tokens"] == 4


async def test_a_bug_is_logged_with_the_request_id(api: Served, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.completions.chat.chat_prompts", None)
    await post(api, "r")
    failed, line = lines("r")
    assert "TypeError" in failed["exception"] and failed["level"] == "error"
    assert (line["status"], line["outcome"]) == (500, "server_error")


async def test_a_bug_in_the_middle(api: Served, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets an error event, the log the exception, and it counts as the server's."""
    counted = 'polylogit_http_requests_total{outcome="server_error",route="/v1/chat/completions"}'
    before = await figure(api, counted)
    a_bug(api, monkeypatch)
    body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True}
    text = (await api.http.post("/v1/chat/completions", json=body, headers={"x-request-id": "r"})).text
    *_, event, done, end = text.split("\n\n")
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["type"], done, end) == ("server_error", "data: [DONE]", "")
    assert "secret" not in text
    await api.fake.idle()
    failed, line = lines("r")
    assert "ValueError: a secret of the server" in failed["exception"]
    assert (line["status"], line["outcome"], line["error"]) == (200, "server_error", error["message"])
    assert await figure(api, counted) == before + 1


async def figure(api: Served, series: str) -> float:
    found = (line.rpartition(" ") for line in (await api.http.get("/metrics")).text.splitlines())
    return next(float(value) for name, _, value in found if name == series)


@pytest.mark.parametrize(
    ("started", "end"),
    [(True, KeyError("bug")), (True, asyncio.CancelledError()), (False, asyncio.CancelledError())],
    ids=["bug", "cancelled", "cancelled early"],
)
async def test_what_ends_early_is_not_ok(api: Served, lines: Lines, started: bool, end: BaseException) -> None:
    """Of any route; uvicorn cancels what has not ended when its time to stop is over."""

    async def cut_off(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise end

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"r")]}
    with pytest.raises(type(end)):
        await Observed(cut_off, ApiMetrics(api.config), None)(scope, receive, send)
    assert lines("r")[-1]["outcome"] == "server_error"


async def test_probes_are_for_debug(api: Served, lines: Lines) -> None:
    for path, level in (
        ("/health/ready", "debug"),
        ("/metrics", "debug"),
        ("/v1/models", "info"),
        ("/made/up", "info"),
    ):
        await api.http.get(path, headers={"x-request-id": path[1:].replace("/", ".")})
        (line,) = lines(path[1:].replace("/", "."))
        assert line["level"] == level
    assert line["route"] == "other"
