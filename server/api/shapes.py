"""What chat and text completions share of OpenAI's response shapes. Chunks are put together from bytes: this
is the code that runs for every token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from server.api.answers import Answer, Piece, PromptScores
from server.api.protocol import GenerationRequest
from server.api.tokenizer import Tokenizer
from server.messages import Choice

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_LOWEST = -9999.0  # JSON has no -inf; vLLM's stand-in

encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def encoded(self) -> bytes:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        }
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return encode(usage)


class Shape(Protocol):
    """How one request's answers are written. `shows_tokens`: a token without text is shown too."""

    shows_tokens: bool

    def opening(self, answers: Sequence[Answer]) -> bytes:
        """The chunks before the first text."""

    def chunk(self, answer: Answer) -> bytes:
        """The next chunk of one answer, with its finish reason if it has one."""

    def closing(self, usage: Usage) -> bytes:
        """The chunk after the last text, if the client asked for one."""

    def response(self, answers: Sequence[Answer], scores: Sequence[PromptScores], usage: Usage) -> bytes:
        """The whole response of a request without streaming; `scores`: of each prompt, if asked for."""


class Common:
    """What both shapes are made of. `kind`: OpenAI's `object`; `chunk_kind`: the same of a chunk."""

    kind: str
    chunk_kind: str

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        identity: str,
        model: str,
        experts: list[str],
    ) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self._about = {"id": identity, "created": int(time.time()), "model": model}
        self._experts = experts
        self.shows_tokens = request.return_token_ids or request.expert_weights or request.alternatives is not None
        about = encode({**self._about, "object": self.chunk_kind})
        self.head = b"data: " + about[:-1] + b',"choices":['
        options = request.stream_options
        self._usage_asked = options is not None and options.include_usage
        self.usage_always = self._usage_asked and options is not None and options.continuous_usage_stats

    def closing(self, usage: Usage) -> bytes:
        return self.head + b'],"usage":' + usage.encoded() + b"}\n\n" if self._usage_asked else b""

    def end_of_choice(self, answer: Answer, piece: Piece) -> bytes:
        """From the fields that every choice's chunk ends with to the end of the chunk."""
        extras = self.extras(answer, piece)
        end = b"," + encode(extras)[1:-1] if extras else b""
        if answer.finish_reason is None:
            end = b',"finish_reason":null' + end + b"}]"
        else:
            finish = b',"finish_reason":' + encode(self.finish_reason(answer))
            end = finish + b',"stop_reason":' + encode(answer.stop_reason) + end + b"}]"
        if self.usage_always:
            end += b',"usage":' + Usage(len(answer.prompt), answer.count).encoded()
        return end + b"}\n\n"

    def finish_reason(self, answer: Answer) -> str | None:
        """Why the answer ended, as this endpoint says it; None while it goes on."""
        return answer.finish_reason

    def extras(self, answer: Answer, piece: Piece) -> dict[str, Any]:
        """The fields of a choice that only some requests ask for."""
        extras: dict[str, Any] = {}
        if self.request.return_token_ids:
            extras["token_ids"] = piece.tokens
        if self.request.expert_weights:
            if self.request.alternatives is None:
                extras["expert_weights"] = self.weights(piece)
            if answer.finish_reason is not None:
                extras["mean_expert_weights"] = dict(zip(self._experts, answer.mean_weights, strict=False))
        return extras

    def weights(self, piece: Piece) -> list[dict[str, float]]:
        return [self.weights_of(choice) for choice in piece.choices]

    def weights_of(self, choice: Choice) -> dict[str, float]:
        """Expert name -> its coefficient for this token."""
        return dict(zip(self._experts, choice.coefficients, strict=True))

    def prompt_logprobs(self, prompt: list[int], scores: PromptScores) -> list[dict[str, Any] | None]:
        """vLLM's form: for each token of the prompt, id -> what is said of it and of the alternatives; null for the
        first."""
        scored = zip(prompt[1:], scores.choices, strict=True)
        return [None, *(self._position(token, choice) for token, choice in scored)]

    def _position(self, token: int, choice: Choice) -> dict[str, Any]:
        entries = {str(token): self._ranked(token, choice.logprob, choice.rank)}
        for rank, (other, logprob) in enumerate(choice.top, start=1):
            entries.setdefault(str(other), self._ranked(other, logprob, rank))
        return entries

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": self.tokenizer.shown(token).text}

    def envelope(self, choices: list[dict[str, Any]], usage: Usage, **more: Any) -> bytes:
        """A whole response."""
        body = encode({**self._about, "object": self.kind, "choices": choices, **more})
        return body[:-1] + b',"usage":' + usage.encoded() + b"}"


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
