"""OpenTelemetry spans of completion requests: the request, and in it the wait for admission, each expert's prefill, the
decoding and the making of text. Off unless an endpoint is configured; then only sampled requests cost anything.

Attributes follow the semantic conventions for generative AI where they have a name. Prompts and answers are in none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from server import __version__
from server.api.client import Generation
from server.api.protocol import GenerationRequest
from server.api.summary import RequestSummary
from server.config import Config
from server.errors import StartError
from server.request import SequenceRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PATH = "/v1/traces"
_LAST_SECONDS = 2.0
_MAX_SEQUENCES = 16
"""Sequences of one request that get spans of their own."""


def tracer_provider(config: Config) -> TracerProvider | None:
    """Where spans go; None if nothing says where. Raises StartError if the packages are not installed."""
    endpoint = config.tracing.endpoint
    if endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartError("tracing: OpenTelemetry is not installed: pip install 'polylogit[otel]'") from None
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    about = {"service.version": __version__} | ({} if named else {"service.name": "polylogit"})
    provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
    url = None if endpoint is None else endpoint.rstrip("/").removesuffix(_PATH) + _PATH
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


def close(provider: TracerProvider) -> None:
    """Send what is waiting, for a moment; a collector that does not answer must not hold up the end."""
    thread = threading.Thread(target=provider.shutdown, daemon=True)
    thread.start()
    thread.join(_LAST_SECONDS)


def trace_of(scope: Scope) -> RequestTrace | None:
    """The trace of the request that `scope` belongs to; None if it is not traced."""
    trace: RequestTrace | None = scope["state"]["trace"]
    return trace


class Tracing:
    """Makes the traces of requests."""

    def __init__(self, provider: TracerProvider, experts: Sequence[str]) -> None:
        self._tracer = provider.get_tracer("polylogit", __version__)
        self._experts = experts

    def start(self, scope: Scope) -> RequestTrace | None:
        """The trace of a request; None if it is not a completion, or not sampled. An incoming `traceparent` is its
        parent."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = _OPERATIONS.get(scope["path"])
        if operation is None or scope["method"] != "POST":
            return None
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        parent = TraceContextTextMapPropagator().extract(headers)
        now = Moment.now()
        span = self._tracer.start_span(operation, parent, SpanKind.SERVER, start_time=now.nanoseconds(now.clock))
        if not span.is_recording():
            return None
        return RequestTrace(self._tracer, span, operation=operation, experts=self._experts, started=now)


@dataclass(frozen=True, slots=True)
class Moment:
    """One moment on two clocks."""

    clock: float
    """Seconds of `time.perf_counter`."""
    epoch: int
    """Nanoseconds since 1970."""

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.time_ns())

    def nanoseconds(self, clock: float) -> int:
        """Since 1970, of another moment given on the first clock."""
        return self.epoch + int((clock - self.clock) * 1e9)


class RequestTrace:
    """One sampled request: a span that is open until `end`, and those of its parts, which are made then."""

    def __init__(self, tracer: Tracer, span: Span, *, operation: str, experts: Sequence[str], started: Moment) -> None:
        self._tracer = tracer
        self._span = span
        self._operation = operation
        self._experts = experts
        self._started = started

    @property
    def trace_id(self) -> str:
        """As W3C writes it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def timed(self, sequences: list[SequenceRequest]) -> list[SequenceRequest]:
        """The sequences, the first of them marked so that the coordinator says when what happened to them."""
        marked = [replace(sequence, timed=True) for sequence in sequences[:_MAX_SEQUENCES]]
        return marked + sequences[_MAX_SEQUENCES:]

    def generated(self, sequences: Sequence[SequenceRequest], generation: Generation, text_seconds: float) -> None:
        """Make the spans of the parts. `text_seconds`: spent on making text and events."""
        now = time.perf_counter()
        first = min((timing.first_token for timing in generation.timings.values()), default=None)
        for place, timing in generation.timings.items():
            about = {"polylogit.sequence": place}
            self._part("queue", timing.queued, timing.admitted, about)
            for index, reported in enumerate(timing.prefilled):
                if reported:
                    tokens = len(sequences[place].prompts[index])
                    more = {"polylogit.expert": self._experts[index], "gen_ai.usage.input_tokens": tokens}
                    self._part(f"prefill {self._experts[index]}", timing.admitted, reported, about | more)
            self._part("decode", timing.first_token, generation.ended_at.get(place, now), about)
        if first is not None:
            self._part("detokenise", first, now, {"polylogit.detokenise.busy_seconds": text_seconds})

    def _part(self, name: str, start: float, end: float, attributes: Mapping[str, Any]) -> None:
        from opentelemetry.trace import set_span_in_context

        moments = self._started.nanoseconds(start), self._started.nanoseconds(end)
        span = self._tracer.start_span(
            name, set_span_in_context(self._span), attributes=dict(attributes), start_time=moments[0]
        )
        span.end(moments[1])

    def end(self, request_id: str, status: int, route: str, summary: RequestSummary, *, gone: bool) -> None:
        """Close the span with what is known at the end."""
        from opentelemetry.trace import StatusCode

        usage = summary.usage
        model = summary.model
        self._span.update_name(f"{self._operation} {model}" if model else self._operation)
        attributes = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "polylogit",
            "gen_ai.response.model": model,
            "gen_ai.response.finish_reasons": summary.finish_reasons or None,
            "gen_ai.usage.input_tokens": usage and usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage and usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage and usage.cached_tokens,
            "http.request.method": "POST",
            "http.route": route,
            "http.response.status_code": status or None,
            "error.type": "client_gone" if gone else summary.error_type or (str(status) if status >= 400 else None),
            "polylogit.request_id": request_id,
            **(_asked(summary.request) if summary.request else {}),
        }
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if summary.failed or status >= 500:
            self._span.set_status(StatusCode.ERROR, summary.error)
        self._span.end()


def _asked(request: GenerationRequest) -> dict[str, Any]:
    """The request's parameters, under their names in the conventions; those left at "off" are left out."""
    return {
        "gen_ai.request.model": request.model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.request.choice.count": request.n if request.n > 1 else None,
        "gen_ai.request.max_tokens": request.max_new_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.top_k": request.top_k if request.top_k > 0 else None,
        "gen_ai.request.seed": request.seed,
        "gen_ai.request.frequency_penalty": request.frequency_penalty or None,
        "gen_ai.request.presence_penalty": request.presence_penalty or None,
    }
