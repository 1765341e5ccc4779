"""What a deployment of real engines says of itself: the lines of all its processes and libraries, and its spans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support import demo
from tests.support.otlp import collector, values
from tests.support.server_process import serve

KEY = "sk-do-not-log-me"
PROMPT = "Sum 94 and 77."
EXPERTS = ["math", "text"]


def chat(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": PROMPT}], "model": "demo:math", "max_tokens": 8, **changes}


REQUESTS = [(chat(), KEY), (chat(model="demo", stream=True), KEY), (chat(model="no"), KEY), (chat(), "sk-wrong")]


@pytest.fixture(scope="module")
def observed() -> Iterator[tuple[str, list[Span]]]:
    """All output of a server that has answered `REQUESTS` and left, and the spans that it sent."""
    with collector() as receiver:
        data = demo.configuration(
            experts=EXPERTS, logging={"format": "json", "level": "debug"}, tracing={"endpoint": receiver.url}
        )
        environment = {"POLYLOGIT_API_KEYS": KEY, "VLLM_LOGGING_LEVEL": "DEBUG"}
        with serve(data, environment) as server:
            for number, (body, key) in enumerate(REQUESTS):
                headers = {"authorization": f"Bearer {key}", "x-request-id": f"request-{number}"}
                server.http.post("/v1/chat/completions", json=body, headers=headers)
            server.terminate()
            assert server.ended() == 0
            output = server.errors()
        yield output, receiver.spans()


def test_every_line_is_json(observed: tuple[str, list[Span]]) -> None:
    lines = [json.loads(line) for line in observed[0].splitlines()]
    assert all({"time", "level", "process", "logger", "message"} <= line.keys() for line in lines)
    workers = {f"expert {name}" for name in EXPERTS}
    assert {line["process"] for line in lines} == {"supervisor", "coordinator", "api", *workers}
    assert {line["process"] for line in lines if line["logger"].startswith("vllm")} == workers


def test_each_request_has_its_line(observed: tuple[str, list[Span]]) -> None:
    lines = [json.loads(line) for line in observed[0].splitlines()]
    (first, stream, refused, unknown) = (line for line in lines if line["message"] == "request")
    assert [line["request_id"] for line in (first, stream, refused, unknown)] == [f"request-{n}" for n in range(4)]
    assert [line["status"] for line in (first, stream, refused, unknown)] == [200, 200, 404, 401]
    assert first["completion_tokens"] == 4 and first["model"] == "demo:math"  # 171 and the end
    assert stream["outcome"] == "ok" and stream["seconds"] > 0
    assert refused["error"] == "model_not_found"
    assert {line["trace_id"] for line in (first, stream)} < {span.trace_id.hex() for span in observed[1]}


def test_no_prompt_and_no_key_in_what_is_written(observed: tuple[str, list[Span]]) -> None:
    output, spans = observed
    everything = output + "".join(map(str, spans))
    for secret in (KEY, "sk-wrong", PROMPT, "94 and"):
        assert secret not in everything


def test_spans(observed: tuple[str, list[Span]]) -> None:
    spans = observed[1]
    roots = {values(span.attributes)["polylogit.request_id"]: span for span in spans if not span.parent_span_id}
    assert {key: span.name for key, span in roots.items()} == {
        **{"request-0": "chat demo:math", "request-1": "chat demo", "request-2": "chat", "request-3": "chat"},
    }
    fused = roots["request-1"]
    parts = {span.name: span for span in spans if span.parent_span_id == fused.span_id}
    assert set(parts) == {"queue", "prefill math", "prefill text", "decode", "detokenise"}
    for part in parts.values():
        assert fused.start_time_unix_nano <= part.start_time_unix_nano <= part.end_time_unix_nano
        assert part.end_time_unix_nano <= fused.end_time_unix_nano
    assert parts["prefill math"].end_time_unix_nano <= parts["decode"].start_time_unix_nano
    assert values(roots["request-0"].attributes)["gen_ai.usage.output_tokens"] == 4
