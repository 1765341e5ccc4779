"""The HTTP surface as one ASGI application: routes, and what stands before them."""

from __future__ import annotations

import os

from fastapi import FastAPI

from server import __version__
from server.api.client import EngineClient
from server.api.http.cors import Cors
from server.api.http.errors import install_handlers
from server.api.http.middleware import BodyLimited, KeyRequired, Observed, key_digests
from server.api.http.openapi import describe
from server.api.http.quotas import KeyLimited
from server.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from server.api.routes import operation, playground
from server.api.routes.completions import completion_routes
from server.api.routes.models import model_routes
from server.api.routes.tokens import token_routes
from server.api.tracing import Tracing
from server.config import Config
from server.errors import ConfigError
from server.metrics.api import ApiMetrics
from server.text.deployment import Deployment


def create_app(config: Config, client: EngineClient, tracing: Tracing | None = None) -> FastAPI:
    """The application. Reads the experts' tokenizers and the keys. Raises StartError."""
    deployment, metrics = Deployment(config), ApiMetrics(config)
    app = FastAPI(title="polylogit", version=__version__, redoc_url=None)
    app.include_router(completion_routes(deployment, client, metrics))
    app.include_router(model_routes(deployment))
    app.include_router(token_routes(deployment))
    app.include_router(operation.operation_routes(client, metrics))
    app.include_router(playground.playground_routes(config))
    describe(app, ChatRequest, CompletionRequest, TokenizeTextRequest, TokenizeChatRequest, DetokenizeRequest)
    install_handlers(app)
    _add_middleware(app, config, metrics, tracing)
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
        app.add_middleware(KeyRequired, digests=digests, is_open=_is_open)
    app.add_middleware(Observed, metrics=metrics, tracing=tracing)
    if origins := config.http.cors_origins:
        app.add_middleware(Cors, origins=origins)


def _is_open(path: str, method: str) -> bool:
    """Whether a request needs no key."""
    return operation.needs_no_key(path) or playground.needs_no_key(path, method)


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
