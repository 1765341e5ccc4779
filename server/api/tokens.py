"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Any

from server.api.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from server.errors import BadRequest
from server.text.deployment import Deployment, Ensemble
from server.text.prompts import chat_prompts, text_prompts

TokenizeRequest = TokenizeChatRequest | TokenizeTextRequest


async def tokenize(deployment: Deployment, request: TokenizeRequest) -> dict[str, Any]:
    """Ids for the first expert of the model."""
    ensemble = deployment.ensemble(request.model)
    ids = (await _ids(ensemble, request))[0]
    strings = [ensemble.tokenizer.token(number) for number in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": ensemble.max_model_len, "tokens": ids, "token_strs": strings}


async def _ids(ensemble: Ensemble, request: TokenizeRequest) -> list[list[int]]:
    if isinstance(request, TokenizeTextRequest):
        return (await text_prompts(ensemble, [request.prompt], add_special_tokens=request.add_special_tokens))[0]
    return await chat_prompts(ensemble, request)


async def detokenize(deployment: Deployment, request: DetokenizeRequest) -> dict[str, str]:
    ensemble = deployment.ensemble(request.model)
    if max(request.tokens, default=0) >= ensemble.vocab_size:
        raise BadRequest(f"tokens: ids are integers from 0 to {ensemble.vocab_size - 1}", param="tokens")
    return {"prompt": await asyncio.to_thread(ensemble.tokenizer.decode, request.tokens)}
