"""POST /v1/chat/completions: from messages to a `Job`, and how its response is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server.api.completions.choices import ChoiceDelta, ChoiceStream, PromptScores
from server.api.completions.encoder import ResponseEncoder, encoded_usage
from server.api.completions.encoding import Encoded, encode, finite
from server.api.completions.ensemble import chosen_ensemble
from server.api.completions.job import Job, check_number, make_job
from server.api.completions.sequences import Prompt, SequenceFactory
from server.api.protocol import ChatRequest
from server.api.summary import Usage
from server.api.tools.calls import CallStream, MessageDelta
from server.api.tools.grammar import chat_grammar
from server.errors import BadRequest
from server.text.deployment import Deployment, Ensemble
from server.text.prompts import chat_prompts, check_scorable, room
from server.wire.api import TokenDetails


async def chat_job(
    deployment: Deployment, next_number: Callable[[], int], request: ChatRequest, request_id: str
) -> Job:
    """Everything that can be refused is refused here, before a byte of the answer."""
    ensemble = chosen_ensemble(deployment, request.model, request.fusion)
    _check_parser(deployment, request)
    check_number(request, deployment.config.limits, prompts=1)
    grammar = await chat_grammar(request)
    factory = SequenceFactory(deployment, ensemble, request, next_number=next_number, grammar=grammar)
    prompts = await chat_prompts(ensemble, request)
    if request.prompt_logprobs is not None:
        check_scorable(ensemble, prompts, "prompt_logprobs")
    prompt = Prompt(prompts, room(ensemble, prompts, "messages"))
    experts = deployment.config.expert_names
    encoder = ChatEncoder(request, ensemble, identity=f"chatcmpl-{request_id}", experts=experts)
    return make_job(request, ensemble, factory, [prompt], encoder)


def _check_parser(deployment: Deployment, request: ChatRequest) -> None:
    """Calls that a grammar does not write must be found by a parser."""
    if request.callable_tools and not request.forces_call and deployment.config.tool_parser is None:
        message = 'tools with tool_choice "auto" need tool_parser in the configuration of this deployment'
        raise BadRequest(message, param="tools", code="unsupported_parameter")


class ChatEncoder(ResponseEncoder):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, ensemble: Ensemble, *, identity: str, experts: list[str]) -> None:
        super().__init__(request, ensemble, identity=identity, experts=experts)
        self._named = request.names_call
        self._calls = [CallStream(request.max_calls) for _ in range(request.n)] if request.callable_tools else []

    def opening(self, choices: Sequence[ChoiceStream]) -> bytes:
        return b"".join(map(self._role, choices))

    def _role(self, choice: ChoiceStream) -> bytes:
        chunk = b'%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]' % choice.index
        if self.request.return_token_ids and choice.index == 0:
            chunk += b',"prompt_token_ids":' + encode(choice.prompt)
        if self.usage_always:
            chunk += b',"usage":' + encoded_usage(Usage(len(choice.prompt), 0))
        return self.head + b'{"index":' + chunk + b"}\n\n"

    def chunk(self, choice: ChoiceStream) -> bytes:
        delta = choice.take()
        message = b'{"content":%b}' % encode(delta.text)
        if self._calls:
            gained = self._gained(choice, delta.text)
            if not (gained.content or gained.calls or choice.finish_reason or self.shows_tokens):
                return b""
            message = encode(_delta(gained))
        logprobs = b"null" if self.request.alternatives is None else encode(self.logprobs(choice, delta))
        text = b'{"index":%d,"delta":%b,"logprobs":%b' % (choice.index, message, logprobs)
        return self.head + text + self.end_of_choice(choice, delta)

    def finish_reason(self, choice: ChoiceStream) -> str | None:
        """As OpenAI says it: a call that the client named is not a reason."""
        called = self._calls and self._calls[choice.index].count and not self._named
        return "tool_calls" if called and choice.finish_reason == "stop" else choice.finish_reason

    def response(self, choices: Sequence[ChoiceStream], scores: Sequence[PromptScores], usage: Usage) -> list[Encoded]:
        more: list[Encoded] = []
        if self.request.return_token_ids:
            more.append(b',"prompt_token_ids":' + encode(choices[0].prompt))
        for score in scores:  # one, of the one prompt
            more += self.prompt_logprobs(score)
        return self.envelope([self._choice(choice) for choice in choices], usage, *more)

    def _choice(self, choice: ChoiceStream) -> list[Encoded]:
        message = {"role": "assistant", **self._message(choice), "refusal": None}
        return self.choice(choice, b'"message":' + encode(message))

    def _message(self, choice: ChoiceStream) -> dict[str, Any]:
        """Content and calls of a complete choice."""
        text = self.text_of(choice)
        if not self._calls:
            return {"content": text}
        gained = self._gained(choice, text)
        calls = [{key: value for key, value in call.shown().items() if key != "index"} for call in gained.calls]
        return {"content": gained.content or None, "tool_calls": calls} if calls else {"content": gained.content}

    def _gained(self, choice: ChoiceStream, text: str) -> MessageDelta:
        """What a choice's calls and content gained with `text`."""
        stream = self._calls[choice.index]
        gained = stream.push(text)
        return gained.joined(stream.flush()) if choice.finish_reason is not None else gained

    def logprobs(self, choice: ChoiceStream, delta: ChoiceDelta) -> dict[str, list[Any]]:
        return {
            "content": [self._entry(token, details) for token, details in zip(delta.tokens, delta.details, strict=True)]
        }

    def _entry(self, token: int, details: TokenDetails) -> dict[str, Any]:
        entry = self._token(token, details.logprob)
        entry["top_logprobs"] = [self._token(*top) for top in details.top[: self.request.alternatives]]
        if self.request.expert_weights:
            entry["expert_weights"] = self.weights_of(details)
        return entry

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        shown = self.tokenizer.shown(token)
        return {"token": shown.text, "logprob": finite(logprob), "bytes": list(shown.bytes)}


def _delta(gained: MessageDelta) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": gained.content} if gained.content else {}
    if gained.calls:
        delta["tool_calls"] = [call.shown() for call in gained.calls]
    return delta
