"""Spans of requests: what is in them, whose children they are, and when there are none."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.api.tracing import tracer_provider
from server.errors import StartError
from tests.support.api.deployment import deployment, ids, write_model
from tests.support.api.fake_coordinator import FakeCoordinator, Script, failure
from tests.support.api.in_process import Served, a_bug, served
from tests.support.api.process import start
from tests.support.otlp import collector, values

PROMPT = "a most secret question"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest_asyncio.fixture
async def traced(tmp_path: Path, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    """A server whose spans go to `spans` as soon as they end."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr("server.api.process.tracer_provider", lambda config: provider)
    async with served(deployment(tmp_path)) as server:
        await server.wait_ready()
        yield server


async def ask(server: Served, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": PROMPT}], **body}
    return await server.http.post("/v1/chat/completions", json=body, headers=headers)


async def finished(spans: InMemorySpanExporter, name: str) -> dict[str, ReadableSpan]:
    """All spans by name, once the one called `name` has ended: the server ends it after its last byte."""
    async with asyncio.timeout(10):
        while name not in {span.name for span in spans.get_finished_spans()}:
            await asyncio.sleep(0.005)
    return {span.name: span for span in spans.get_finished_spans()}


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time, span.end_time


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_and_its_parts(traced: Served, spans: InMemorySpanExporter, stream: bool) -> None:
    traced.fake.script = Script(pause=0.002)
    await ask(traced, {"x-request-id": "r"}, model="duo", stream=stream, temperature=0.5, max_tokens=100, seed=3)
    found = await finished(spans, "chat duo")
    assert set(found) == {"chat duo", "queue", "prefill math", "prefill text", "decode", "detokenise"}
    root = found.pop("chat duo")
    assert root.kind is SpanKind.SERVER and root.parent is None and root.status.status_code is StatusCode.UNSET
    assert dict(root.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "polylogit",
        "gen_ai.request.model": "duo",
        "gen_ai.request.stream": stream,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.max_tokens": 100,
        "gen_ai.request.seed": 3,
        "gen_ai.response.model": "duo",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": len(PROMPT) + 4,
        "gen_ai.usage.output_tokens": 14,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "polylogit.request_id": "r",
    }
    start, end = times(root)
    for part in found.values():
        assert part.parent is not None and part.parent.span_id == root.get_span_context().span_id
        assert start <= times(part)[0] <= times(part)[1] <= end
    admitted = times(found["queue"])[1]
    assert admitted == times(found["prefill math"])[0] == times(found["prefill text"])[0]
    assert times(found["prefill math"])[1] < times(found["prefill text"])[1] <= times(found["decode"])[0]
    assert times(found["decode"])[1] - times(found["decode"])[0] > 14 * 0.002 * 1e9 * 0.9
    assert dict(found["prefill text"].attributes or {})["polylogit.expert"] == "text"
    assert not any(PROMPT in str(span.to_json()) for span in spans.get_finished_spans())


async def test_traceparent_is_honoured(traced: Served, spans: InMemorySpanExporter) -> None:
    await ask(traced, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    root = (await finished(spans, "chat duo"))["chat duo"]
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)


async def test_what_the_parent_does_not_sample_is_not_timed(traced: Served, spans: InMemorySpanExporter) -> None:
    await ask(traced, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    await ask(traced)
    await finished(spans, "chat duo")
    assert [request.timed for request in traced.fake.submitted] == [False, True]
    assert TRACE not in {f"{span.context.trace_id:032x}" for span in spans.get_finished_spans()}


async def test_choices_have_parts_of_their_own(traced: Served, spans: InMemorySpanExporter) -> None:
    await ask(traced, n=3)
    await finished(spans, "chat duo")
    decodes = [span for span in spans.get_finished_spans() if span.name == "decode"]
    assert sorted(dict(span.attributes or {})["polylogit.sequence"] for span in decodes) == [0, 1, 2]


async def test_text_completions_and_other_routes(traced: Served, spans: InMemorySpanExporter) -> None:
    await traced.http.get("/v1/models")
    await traced.http.get("/v1/chat/completions")
    await traced.complete(model="duo:math")
    found = await finished(spans, "text_completion duo:math")
    assert set(found) == {"text_completion duo:math", "queue", "prefill math", "decode", "detokenise"}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [({"model": "no"}, "model_not_found", StatusCode.UNSET), ({"stream": True}, "server_error", StatusCode.ERROR)],
    ids=["refused", "failed in the middle"],
)
async def test_errors(
    traced: Served, spans: InMemorySpanExporter, body: dict[str, Any], kind: str, status: StatusCode
) -> None:
    traced.fake.script = Script(tokens=lambda _: ids("half"), ended=failure())
    await ask(traced, **body)
    name = "chat" if "model" in body else "chat duo"
    root = (await finished(spans, name))[name]
    assert dict(root.attributes or {})["error.type"] == kind
    assert root.status.status_code is status


async def test_a_bug_in_the_middle(
    traced: Served, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_bug(traced, monkeypatch)
    await ask(traced, stream=True)
    root = (await finished(spans, "chat duo"))["chat duo"]
    assert dict(root.attributes or {})["error.type"] == "server_error"
    assert root.status.status_code is StatusCode.ERROR


async def test_a_client_that_leaves(traced: Served, spans: InMemorySpanExporter) -> None:
    traced.fake.script = Script(tokens=lambda _: ids("endless " * 50), pause=0.02)
    request = asyncio.create_task(ask(traced))
    await traced.fake.busy()
    await asyncio.sleep(0.1)
    request.cancel()
    found = await finished(spans, "chat duo")
    assert dict(found["chat duo"].attributes or {})["error.type"] == "client_gone"
    assert times(found["decode"])[1] <= times(found["chat duo"])[1]


async def test_off_by_default(api: Served) -> None:
    assert tracer_provider(api.config) is None
    await ask(api, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert not api.fake.submitted[0].timed


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    config = deployment(tmp_path, tracing={"endpoint": "http://127.0.0.1:4318"})
    with pytest.raises(StartError, match=r"^tracing: OpenTelemetry is not installed: pip install 'polylogit\[otel\]'$"):
        tracer_provider(config)


@pytest.mark.parametrize("by", ["configuration", "environment"])
async def test_spans_reach_a_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The api as a process of its own; what is not yet sent when it ends is sent then."""
    write_model(tmp_path / "model")
    with collector() as receiver, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        more = ""
        if by == "environment":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
            monkeypatch.setenv("OTEL_SERVICE_NAME", "fusion")
        else:
            more = f"tracing: {{endpoint: '{receiver.url}'}}\n"
        fake = FakeCoordinator(f"{tmp_path}/api")
        running = asyncio.create_task(fake.run())
        process = start(tmp_path, listener, more)
        listener.listen()
        try:
            await fake.status()
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as http:
                body = {"messages": [{"role": "user", "content": PROMPT}]}
                assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            await fake.stop()
            _, errors = await asyncio.to_thread(process.communicate, timeout=20)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()
            process.wait()
            running.cancel()
            fake.close()
        spans = await asyncio.to_thread(receiver.wait, 5)
        assert {span.name for span in spans} == {"chat solo", "queue", "prefill math", "decode", "detokenise"}
        assert values(receiver.received[0].resource.attributes)["service.name"] == (
            "fusion" if by == "environment" else "polylogit"
        )
        (root,) = (span for span in spans if span.name == "chat solo")
        assert values(root.attributes)["gen_ai.usage.output_tokens"] == 14
        assert all(span.trace_id == root.trace_id for span in spans)
