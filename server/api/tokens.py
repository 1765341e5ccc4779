"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from server.api.body import parse
from server.api.deployment import Choir, Deployment
from server.api.prompts import Chat, chat_prompts, text_prompts
from server.api.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from server.errors import BadRequest


async def tokenize(deployment: Deployment, body: dict[str, Any]) -> dict[str, Any]:
    """Ids for the first expert of the model."""
    request: TokenizeChatRequest | TokenizeTextRequest
    request = parse(TokenizeChatRequest, body) if "messages" in body else parse(TokenizeTextRequest, body)
    choir = deployment.choir(request.model)
    ids = (await _ids(choir, request))[0]
    strings = [choir.tokenizer.token(number) for number in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": choir.max_model_len, "tokens": ids, "token_strs": strings}


async def _ids(choir: Choir, request: TokenizeChatRequest | TokenizeTextRequest) -> list[list[int]]:
    if isinstance(request, TokenizeTextRequest):
        return (await text_prompts(choir, [request.prompt], add_special_tokens=request.add_special_tokens))[0]
    chat = Chat(
        request.messages,
        arguments=request.chat_template_kwargs,
        continue_final_message=request.continue_final_message,
        add_generation_prompt=request.add_generation_prompt,
        add_special_tokens=request.add_special_tokens,
    )
    return await chat_prompts(choir, chat)


def detokenize(deployment: Deployment, request: DetokenizeRequest) -> dict[str, str]:
    choir = deployment.choir(request.model)
    if max(request.tokens, default=0) >= choir.vocab_size:
        raise BadRequest(f"tokens: ids are integers from 0 to {choir.vocab_size - 1}", param="tokens")
    return {"prompt": choir.tokenizer.decode(request.tokens)}
