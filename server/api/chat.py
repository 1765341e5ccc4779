"""POST /v1/chat/completions: from messages to a `Job`, and the shape of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.answers import Answer, Piece
from server.api.prompts import Chat, chat_prompts, room
from server.api.protocol import ChatRequest
from server.api.reply import Job
from server.api.sequences import Prompt
from server.api.services import Services
from server.api.shapes import Common, Usage, encode, finite
from server.messages import Choice


async def chat_job(services: Services, request: ChatRequest, request_id: str) -> Job:
    """Everything that can be refused is refused here, before a byte of the answer."""
    ensemble = services.deployment.ensemble(request.model, request.fusion)
    factory = services.sequences(ensemble, request)
    prompts = await chat_prompts(ensemble, Chat(request))
    prompt = Prompt(prompts, room(ensemble, prompts, "messages"))
    shape = ChatShape(
        request,
        ensemble.tokenizer,
        identity=f"chatcmpl-{request_id}",
        model=ensemble.model,
        experts=services.deployment.config.expert_names,
    )
    return services.job(request, ensemble, factory, [prompt], shape)


class ChatShape(Common):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, answers: Sequence[Answer]) -> bytes:
        return b"".join(map(self._role, answers))

    def _role(self, answer: Answer) -> bytes:
        chunk = b'%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % answer.index
        if self.request.return_token_ids and answer.index == 0:
            chunk += b',"prompt_token_ids":' + encode(answer.prompt)
        if self.usage_always:
            chunk += b',"usage":' + Usage(len(answer.prompt), 0).encoded()
        return self.head + b'{"index":' + chunk + b"}\n\n"

    def chunk(self, answer: Answer) -> bytes:
        piece = answer.take()
        logprobs = b"null" if self.request.alternatives is None else encode(self._logprobs(piece))
        text = b'{"index":%d,"delta":{"content":%b},"logprobs":%b' % (
            answer.index,
            encode(piece.text),
            logprobs,
        )
        return self.head + text + self.end_of_choice(answer, piece)

    def response(self, answers: Sequence[Answer], usage: Usage) -> bytes:
        more = {"prompt_token_ids": answers[0].prompt} if self.request.return_token_ids else {}
        return self.envelope([self._choice(answer) for answer in answers], usage, **more)

    def _choice(self, answer: Answer) -> dict[str, Any]:
        piece = answer.take()
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": None if self.request.alternatives is None else self._logprobs(piece),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **self.extras(answer, piece),
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return {
            "content": [self._entry(token, choice) for token, choice in zip(piece.tokens, piece.choices, strict=True)]
        }

    def _entry(self, token: int, choice: Choice) -> dict[str, Any]:
        entry = self._token(token, choice.logprob)
        entry["top_logprobs"] = [self._token(*top) for top in choice.top[: self.request.alternatives]]
        if self.request.expert_weights:
            entry["expert_weights"] = self.weights_of(choice)
        return entry

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        shown = self.tokenizer.shown(token)
        return {"token": shown.text, "logprob": finite(logprob), "bytes": list(shown.bytes)}
