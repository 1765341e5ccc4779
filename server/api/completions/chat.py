"""POST /v1/chat/completions: from messages to a `Job`, and the shape of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.completions.answers import Answer, Piece, PromptScores
from server.api.completions.fusion import chosen_ensemble
from server.api.completions.reply import Job
from server.api.completions.sequences import Prompt
from server.api.completions.shapes import Common, Part, Usage, encode, finite
from server.api.protocol import ChatRequest
from server.api.services import Services
from server.api.tools.calls import CallStream, Gained
from server.api.tools.grammar import chat_grammar
from server.errors import BadRequest
from server.text.prompts import chat_prompts, check_scorable, room
from server.wire.api import Choice


async def chat_job(services: Services, request: ChatRequest, request_id: str) -> Job:
    """Everything that can be refused is refused here, before a byte of the answer."""
    ensemble = chosen_ensemble(services.deployment, request.model, request.fusion)
    _check_parser(services, request)
    services.check_number(request, prompts=1)
    factory = services.sequences(ensemble, request, await chat_grammar(request))
    prompts = await chat_prompts(ensemble, request)
    if request.prompt_logprobs is not None:
        check_scorable(ensemble, prompts, "prompt_logprobs")
    prompt = Prompt(prompts, room(ensemble, prompts, "messages"))
    shape = ChatShape(
        request,
        ensemble.tokenizer,
        identity=f"chatcmpl-{request_id}",
        model=ensemble.model,
        experts=services.deployment.config.expert_names,
    )
    return services.job(request, ensemble, factory, [prompt], shape)


def _check_parser(services: Services, request: ChatRequest) -> None:
    """Calls that a grammar does not write must be found by a parser."""
    if request.callable_tools and not request.forces_call and services.deployment.config.tool_parser is None:
        message = 'tools with tool_choice "auto" need tool_parser in the configuration of this deployment'
        raise BadRequest(message, param="tools", code="unsupported_parameter")


class ChatShape(Common):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, *arguments: Any, **named: Any) -> None:
        super().__init__(request, *arguments, **named)
        self._named = request.names_call
        self._calls = [CallStream(request.max_calls) for _ in range(request.n)] if request.callable_tools else []

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
        delta = b'{"content":%b}' % encode(piece.text)
        if self._calls:
            gained = self._gained(answer, piece.text)
            if not (gained.content or gained.calls or answer.finish_reason or self.shows_tokens):
                return b""
            delta = encode(_delta(gained))
        logprobs = b"null" if self.request.alternatives is None else encode(self.logprobs(answer, piece))
        text = b'{"index":%d,"delta":%b,"logprobs":%b' % (answer.index, delta, logprobs)
        return self.head + text + self.end_of_choice(answer, piece)

    def finish_reason(self, answer: Answer) -> str | None:
        """As OpenAI says it: a call that the client named is no reason."""
        called = self._calls and self._calls[answer.index].count and not self._named
        return "tool_calls" if called and answer.finish_reason == "stop" else answer.finish_reason

    def response(self, answers: Sequence[Answer], scores: Sequence[PromptScores], usage: Usage) -> list[Part]:
        more: list[Part] = []
        if self.request.return_token_ids:
            more.append(b',"prompt_token_ids":' + encode(answers[0].prompt))
        for score in scores:  # one, of the one prompt
            more += self.prompt_logprobs(score)
        return self.envelope([self._choice(answer) for answer in answers], usage, *more)

    def _choice(self, answer: Answer) -> list[Part]:
        message = {"role": "assistant", **self._message(answer), "refusal": None}
        return self.choice(answer, b'"message":' + encode(message))

    def _message(self, answer: Answer) -> dict[str, Any]:
        """A whole answer's content and calls."""
        text = self.text_of(answer)
        if not self._calls:
            return {"content": text}
        gained = self._gained(answer, text)
        calls = [{key: value for key, value in call.shown().items() if key != "index"} for call in gained.calls]
        return {"content": gained.content or None, "tool_calls": calls} if calls else {"content": gained.content}

    def _gained(self, answer: Answer, text: str) -> Gained:
        """What an answer's calls and content gained with `text`."""
        stream = self._calls[answer.index]
        gained = stream.push(text)
        return gained.joined(stream.flush()) if answer.finish_reason is not None else gained

    def logprobs(self, answer: Answer, piece: Piece) -> dict[str, list[Any]]:
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


def _delta(gained: Gained) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": gained.content} if gained.content else {}
    if gained.calls:
        delta["tool_calls"] = [call.shown() for call in gained.calls]
    return delta
