"""Whatever goes wrong comes as an error object."""

from __future__ import annotations

import json

from tests.support.api.fake_coordinator import Script, failure
from tests.support.api.in_process import Served

CHAT = "/v1/chat/completions"


async def test_routes_that_are_not_there(api: Served) -> None:
    for path in ("/playground", "/nothing", "/v1/nothing", "/v1/models/nothing"):
        answer = await api.http.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error"
    answer = await api.http.get(CHAT)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and "error" in answer.json()


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
