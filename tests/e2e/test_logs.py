"""All that a deployment writes, by whatever process and library: JSON, with the request's id, without its prompt."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e import demo
from tests.e2e.serving import serve

KEY = "sk-do-not-log-me"
PROMPT = "Sum 94 and 77."
ENVIRONMENT = {"POLYLOGIT_API_KEYS": KEY, "VLLM_LOGGING_LEVEL": "DEBUG"}


def chat(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, **changes}


def test_every_line_is_json_and_none_tells_the_prompt() -> None:
    data = demo.configuration(experts=["math"], logging={"format": "json", "level": "debug"})
    with serve(data, ENVIRONMENT) as server:
        for number, (body, key) in enumerate(
            [(chat(), KEY), (chat(stream=True), KEY), (chat(model="no"), KEY), (chat(), "sk-wrong")]
        ):
            headers = {"authorization": f"Bearer {key}", "x-request-id": f"request-{number}"}
            server.http.post("/v1/chat/completions", json=body, headers=headers)
        server.terminate()
        assert server.ended() == 0
        output = server.errors()
    lines = [json.loads(line) for line in output.splitlines()]
    assert all({"time", "level", "process", "logger", "message"} <= line.keys() for line in lines)
    assert {line["process"] for line in lines} == {"supervisor", "coordinator", "api", "expert math"}
    assert any(line["logger"].startswith("vllm") for line in lines)
    for secret in (KEY, "sk-wrong", PROMPT, "94 and"):
        assert secret not in output
    requests = {line["request_id"]: line for line in lines if "request_id" in line}
    assert [requests[f"request-{number}"]["status"] for number in range(4)] == [200, 200, 404, 401]
    assert requests["request-1"]["completion_tokens"] == 4 and requests["request-1"]["model"] == "demo"
    assert requests["request-2"]["error"] == "model_not_found"
