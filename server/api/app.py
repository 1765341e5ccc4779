"""The HTTP surface as one ASGI application: routes, and what stands before them."""

from __future__ import annotations

import os
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from server import __version__
from server.api.client import EngineClient
from server.api.completions.chat import chat_job
from server.api.completions.shapes import encode
from server.api.completions.text import completion_job
from server.api.http.body import read, read_json, validated
from server.api.http.cors import Cors
from server.api.http.faults import install_handlers
from server.api.http.middleware import BodyLimited, KeyRequired, Observed, key_digests
from server.api.http.openapi import ANYWHERE, POSTING, READING, STREAMED, body_of, describe, errors
from server.api.http.quotas import KeyLimited
from server.api.models import model_card, model_list
from server.api.playground import playground_routes
from server.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from server.api.services import Services
from server.api.tokens import detokenize, tokenize
from server.api.tracing import Tracing
from server.config import Config
from server.errors import ConfigError
from server.metrics.api import ApiMetrics, render
from server.text.deployment import Deployment

_STATS_SECONDS = 0.5
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(config: Config, client: EngineClient, tracing: Tracing | None = None) -> FastAPI:
    """The application. Reads the experts' tokenizers and the keys. Raises StartError."""
    services = Services(Deployment(config), client, ApiMetrics(config))
    app = FastAPI(title="polylogit", version=__version__, redoc_url=None)
    app.include_router(_completion_routes(services))
    app.include_router(_model_routes(services.deployment))
    app.include_router(_token_routes(services.deployment))
    app.include_router(_operation_routes(services))
    app.include_router(playground_routes(config))
    models = (ChatRequest, CompletionRequest, TokenizeTextRequest, TokenizeChatRequest, DetokenizeRequest)
    describe(app, *models)
    install_handlers(app)
    _add_middleware(app, config, services.metrics, tracing)
    return app


def _add_middleware(app: FastAPI, config: Config, metrics: ApiMetrics, tracing: Tracing | None) -> None:
    """The last one added is the first to see a request."""
    app.add_middleware(BodyLimited, max_bytes=config.limits.body_bytes)
    digests, limits = key_digests(_keys(config)), config.limits
    if limits.key_requests or limits.key_requests_per_minute:
        if not digests:
            raise ConfigError("limits.key_requests and key_requests_per_minute need keys (http.api_keys_file)")
        app.add_middleware(KeyLimited, max_running=limits.key_requests, per_minute=limits.key_requests_per_minute)
    if digests:
        app.add_middleware(KeyRequired, digests=digests)
    app.add_middleware(Observed, metrics=metrics, tracing=tracing)
    if origins := config.http.cors_origins:
        app.add_middleware(Cors, origins=origins)


def _keys(config: Config) -> list[str]:
    keys = os.environ.get("POLYLOGIT_API_KEYS", "").split(",")
    if config.http.api_keys_file is None:
        return keys
    path = config.path(config.http.api_keys_file)
    try:
        found = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"http.api_keys_file: {path} cannot be read: {type(error).__name__}") from None
    if not any(key.strip() for key in found):
        raise ConfigError(f"http.api_keys_file: {path} has no key in it")
    return keys + found


def _completion_routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["completions"], responses=errors(*POSTING))

    @router.post("/v1/chat/completions", responses=STREAMED, openapi_extra=body_of(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Continue a conversation."""
        services.client.require_ready()
        body = await read(request, ChatRequest)
        return services.reply(await chat_job(services, body, request.state.request_id))

    @router.post("/v1/completions", responses=STREAMED, openapi_extra=body_of(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continue a text."""
        services.client.require_ready()
        body = await read(request, CompletionRequest)
        return services.reply(await completion_job(services, body, request.state.request_id))

    return router


def _model_routes(deployment: Deployment) -> APIRouter:
    router = APIRouter(tags=["models"], responses=errors(*READING))
    created = int(time.time())

    @router.get("/v1/models")
    async def list_models() -> Response:
        """All that may be asked for: the deployment, its policies, each expert alone."""
        return _json(model_list(deployment, created))

    @router.get("/v1/models/{model}")
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        return _json(model_card(deployment, model, created))

    return router


def _token_routes(deployment: Deployment) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=errors(*POSTING))

    @router.post("/tokenize", openapi_extra=body_of(TokenizeTextRequest, TokenizeChatRequest))
    async def create_tokens(request: Request) -> Response:
        """Token ids of a text, or of a conversation's prompt."""
        body = await read_json(request)
        kind = TokenizeChatRequest if "messages" in body else TokenizeTextRequest
        return _json(await tokenize(deployment, await validated(request, kind, body)))

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def create_text(request: Request) -> Response:
        """Text of token ids."""
        return _json(await detokenize(deployment, await read(request, DetokenizeRequest)))

    return router


def _operation_routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["operation"], responses=errors(*ANYWHERE))
    client = services.client

    @router.get("/health/live")
    async def live() -> Response:
        """Whether the api process answers at all; needs no key."""
        return _json({"status": "ok"})

    @router.get("/health", responses=errors(503))
    @router.get("/health/ready", responses=errors(503))
    async def ready() -> Response:
        """Whether completions are answered, and the state of each expert; 503 while not; needs no key."""
        client.require_ready()
        return _json({"status": "ok", "experts": client.status.experts if client.status else {}})

    @router.get("/metrics", response_class=PlainTextResponse, responses=errors(*READING))
    async def metrics() -> Response:
        """Counters and histograms, as Prometheus reads them."""
        stats = await client.stats(_STATS_SECONDS)
        text = render(services.metrics, stats, age=client.stats_age, ready=client.ready)
        return Response(text, media_type=_METRICS_TYPE)

    @router.get("/version", responses=errors(*READING))
    async def version() -> Response:
        """The server's version."""
        return _json({"version": __version__})

    return router


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")
