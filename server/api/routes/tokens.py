"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.http.body import read, read_json, validated
from server.api.http.openapi import POSTING, body_of, error_responses
from server.api.http.responses import json_response
from server.api.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from server.errors import BadRequest
from server.text.deployment import Deployment, Ensemble
from server.text.prompts import chat_prompts, text_prompts

TokenizeRequest = TokenizeChatRequest | TokenizeTextRequest

_TOKENIZE_EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "Hello!"},
    "chat": {"messages": [{"role": "user", "content": "Hello!"}]},
}
_DETOKENIZE_EXAMPLES = {"ids": {"tokens": [65, 66]}}


def token_routes(deployment: Deployment) -> APIRouter:
    router = APIRouter(tags=["tokens"], responses=error_responses(*POSTING))
    either = body_of(TokenizeTextRequest, TokenizeChatRequest, examples=_TOKENIZE_EXAMPLES)

    @router.post("/tokenize", openapi_extra=either)
    async def create_tokens(request: Request) -> Response:
        """Token ids of a text, or of a conversation's prompt."""
        body = await read_json(request)
        kind = TokenizeChatRequest if "messages" in body else TokenizeTextRequest
        return json_response(await _tokenize(deployment, await validated(request, kind, body)))

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest, examples=_DETOKENIZE_EXAMPLES))
    async def create_text(request: Request) -> Response:
        """Text of token ids."""
        return json_response(await _detokenize(deployment, await read(request, DetokenizeRequest)))

    return router


async def _tokenize(deployment: Deployment, request: TokenizeRequest) -> dict[str, Any]:
    """Ids for the first expert of the model."""
    ensemble = deployment.ensemble(request.model)
    ids = (await _ids(ensemble, request))[0]
    strings = [ensemble.tokenizer.token(number) for number in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": ensemble.max_model_len, "tokens": ids, "token_strs": strings}


async def _ids(ensemble: Ensemble, request: TokenizeRequest) -> list[list[int]]:
    if isinstance(request, TokenizeTextRequest):
        return (await text_prompts(ensemble, [request.prompt], add_special_tokens=request.add_special_tokens))[0]
    return await chat_prompts(ensemble, request)


async def _detokenize(deployment: Deployment, request: DetokenizeRequest) -> dict[str, str]:
    ensemble = deployment.ensemble(request.model)
    if max(request.tokens, default=0) >= ensemble.vocab_size:
        raise BadRequest(f"tokens: ids must be integers from 0 to {ensemble.vocab_size - 1}", param="tokens")
    return {"prompt": await asyncio.to_thread(ensemble.tokenizer.decode, request.tokens)}
