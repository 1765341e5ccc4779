"""For those who operate the server: health, /metrics, /version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from server import __version__
from server.api.client import EngineClient
from server.api.http.openapi import ANYWHERE, READING, error_responses
from server.api.http.responses import json_response
from server.metrics.api import ApiMetrics, render

_STATS_SECONDS = 0.5
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operation_routes(client: EngineClient, api_metrics: ApiMetrics) -> APIRouter:
    router = APIRouter(tags=["operation"], responses=error_responses(*ANYWHERE))

    @router.get("/health/live")
    async def live() -> Response:
        """Whether the api process answers at all; needs no key."""
        return json_response({"status": "ok"})

    @router.get("/health", responses=error_responses(503))
    @router.get("/health/ready", responses=error_responses(503))
    async def ready() -> Response:
        """Whether completions are answered, and the state of each expert; 503 while not; needs no key."""
        client.require_ready()
        return json_response({"status": "ok", "experts": client.status.experts if client.status else {}})

    @router.get("/metrics", response_class=PlainTextResponse, responses=error_responses(*READING))
    async def metrics() -> Response:
        """Counters and histograms, as Prometheus reads them."""
        stats = await client.stats(_STATS_SECONDS)
        text = render(api_metrics, stats, age=client.stats_age, ready=client.ready)
        return Response(text, media_type=_METRICS_TYPE)

    @router.get("/version", responses=error_responses(*READING))
    async def version() -> Response:
        """The server's version."""
        return json_response({"version": __version__})

    return router


def needs_no_key(path: str) -> bool:
    """Whether a path is one of the health checks, which need no key."""
    return path == "/health" or path.startswith("/health/")
