"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.client import EngineClient
from server.api.completions.chat import chat_job
from server.api.completions.job import Job
from server.api.completions.response import CompletionResponse
from server.api.completions.text import completion_job
from server.api.http.body import read
from server.api.http.openapi import POSTING, STREAMED, body_of, error_responses
from server.api.protocol import ChatRequest, CompletionRequest
from server.metrics.api import ApiMetrics
from server.text.deployment import Deployment

_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
_TEXT: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 8}
_CHAT_EXAMPLES = {"plain": _CHAT, "stream": {**_CHAT, "stream": True}}
_TEXT_EXAMPLES = {"plain": _TEXT, "stream": {**_TEXT, "stream": True}, "scores": {**_TEXT, "prompt_logprobs": 1}}


def completion_routes(deployment: Deployment, client: EngineClient, metrics: ApiMetrics) -> APIRouter:
    router = APIRouter(tags=["completions"], responses=error_responses(*POSTING))

    def response(job: Job) -> Response:
        return CompletionResponse(job, client, metrics, deployment.config.http)

    @router.post(
        "/v1/chat/completions", responses=STREAMED, openapi_extra=body_of(ChatRequest, examples=_CHAT_EXAMPLES)
    )
    async def create_chat_completion(request: Request) -> Response:
        """Continue a conversation."""
        client.require_ready()
        body = await read(request, ChatRequest)
        return response(await chat_job(deployment, client.number, body, request.state.request_id))

    @router.post(
        "/v1/completions", responses=STREAMED, openapi_extra=body_of(CompletionRequest, examples=_TEXT_EXAMPLES)
    )
    async def create_completion(request: Request) -> Response:
        """Continue a text."""
        client.require_ready()
        body = await read(request, CompletionRequest)
        return response(await completion_job(deployment, client.number, body, request.state.request_id))

    return router
