"""What chat and text completions share of OpenAI's response shapes. Chunks are put together from bytes: this
is the code that runs for every token. Of a whole response, too, what is said of a token is encoded when it comes:
at the end it may be a hundred megabytes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from server.api.completions.answers import Answer, Piece, PromptScores
from server.api.protocol import GenerationRequest
from server.text.tokenizer import Tokenizer
from server.wire.api import Choice

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_LOWEST = -9999.0  # JSON has no -inf; vLLM's stand-in
_SCORES = "prompt_logprobs"

encode = msgspec.json.Encoder().encode

Part = bytes | bytearray
"""Of a response."""


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

    def keep(self, reader: Answer | PromptScores) -> None:
        """Take what one answer, or one prompt's scores, gained, for a whole response."""

    def response(self, answers: Sequence[Answer], scores: Sequence[PromptScores], usage: Usage) -> list[Part]:
        """All that was kept; `scores`: of each prompt, if asked for."""


class Arrays:
    """An object of arrays that grow. Its items are encoded when they come."""

    def __init__(self) -> None:
        self._arrays: dict[str, bytearray] = {}

    def add(self, arrays: Mapping[str, Sequence[Any]]) -> None:
        for name, items in arrays.items():
            array = self._arrays.setdefault(name, bytearray())
            if items:
                array += (b"," if array else b"") + encode(items)[1:-1]

    def fields(self) -> list[Part]:
        """The object without its braces."""
        parts: list[Part] = []
        for name, array in self._arrays.items():
            parts += [b",%b:[" % encode(name) if parts else b"%b:[" % encode(name), array, b"]"]
        return parts


@dataclass(slots=True)
class Kept:
    """One answer so far. `logprobs` and `beside` are what is said of its tokens."""

    texts: list[str] = field(default_factory=list)
    logprobs: Arrays = field(default_factory=Arrays)
    beside: Arrays = field(default_factory=Arrays)


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
        self._begun: set[int] = set()  # choices that a chunk was made of
        self._kept: defaultdict[int, Kept] = defaultdict(Kept)
        self._scores: defaultdict[int, Arrays] = defaultdict(_scores_of_the_first)
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
        """The fields of a choice's chunk that only some requests ask for."""
        extras = self._beside(piece)
        if answer.finish_reason is not None:
            extras |= self._mean_weights(answer)
        if answer.index not in self._begun:
            self._begun.add(answer.index)
            extras |= self.about_prompt(answer)
        return extras

    def about_prompt(self, answer: Answer) -> dict[str, Any]:
        """The fields of a choice that say what was asked."""
        return {}

    def _beside(self, piece: Piece) -> dict[str, Any]:
        """The fields of a choice with an entry for each token, besides `logprobs`."""
        beside: dict[str, Any] = {"token_ids": piece.tokens} if self.request.return_token_ids else {}
        if self.request.expert_weights and self.request.alternatives is None:
            beside["expert_weights"] = self.weights(piece)
        return beside

    def _mean_weights(self, answer: Answer) -> dict[str, Any]:
        if not self.request.expert_weights:
            return {}
        return {"mean_expert_weights": dict(zip(self._experts, answer.mean_weights, strict=False))}

    def logprobs(self, answer: Answer, piece: Piece) -> dict[str, list[Any]]:
        """What the client asked to know of each token, as this endpoint writes it."""
        raise NotImplementedError

    def weights(self, piece: Piece) -> list[dict[str, float]]:
        return [self.weights_of(choice) for choice in piece.choices]

    def weights_of(self, choice: Choice) -> dict[str, float]:
        """Expert name -> its coefficient for this token."""
        return dict(zip(self._experts, choice.coefficients, strict=True))

    def keep(self, reader: Answer | PromptScores) -> None:
        if isinstance(reader, PromptScores):
            scored = [self._position(token, choice) for token, choice in reader.take()]
            self._scores[reader.index].add({_SCORES: scored})
            return
        piece, kept = reader.take(), self._kept[reader.index]
        kept.texts.append(piece.text)
        kept.beside.add(self._beside(piece))
        if self.request.alternatives is not None:
            kept.logprobs.add(self.logprobs(reader, piece))

    def text_of(self, answer: Answer) -> str:
        """All that was kept of it."""
        return "".join(self._kept[answer.index].texts)

    def choice(self, answer: Answer, said: bytes, *more: Part) -> list[Part]:
        """A whole choice. `said`: its text or message, as a field; `more`: of its fields."""
        kept = self._kept[answer.index]
        logprobs = [b"null"] if self.request.alternatives is None else [b"{", *kept.logprobs.fields(), b"}"]
        end = b',"finish_reason":%b,"stop_reason":%b' % (encode(self.finish_reason(answer)), encode(answer.stop_reason))
        few = encode({**self._mean_weights(answer), **self.about_prompt(answer)})[1:-1]
        fields: list[Part] = [end, *_after_comma(kept.beside.fields()), *_after_comma([few] if few else []), *more]
        return [b'{"index":%d,%b,"logprobs":' % (answer.index, said), *logprobs, *fields, b"}"]

    def prompt_logprobs(self, scores: PromptScores) -> list[Part]:
        """A field in vLLM's form: for each token of the prompt, id -> what is said of it and of the alternatives; null
        for the first."""
        return _after_comma(self._scores[scores.index].fields())

    def _position(self, token: int, choice: Choice) -> dict[str, Any]:
        entries = {str(token): self._ranked(token, choice.logprob, choice.rank)}
        for rank, (other, logprob) in enumerate(choice.top, start=1):
            entries.setdefault(str(other), self._ranked(other, logprob, rank))
        return entries

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": self.tokenizer.shown(token).text}

    def envelope(self, choices: Sequence[list[Part]], usage: Usage, *more: Part) -> list[Part]:
        """A whole response. `more`: of its fields."""
        parts: list[Part] = [encode({**self._about, "object": self.kind})[:-1] + b',"choices":[']
        for index, choice in enumerate(choices):
            parts += _after_comma(choice) if index else choice
        return [*parts, b"]", *more, b',"usage":' + usage.encoded() + b"}"]


def _scores_of_the_first() -> Arrays:
    """Of a prompt's first token nothing can be said."""
    scores = Arrays()
    scores.add({_SCORES: [None]})
    return scores


def _after_comma(parts: list[Part]) -> list[Part]:
    return [b",", *parts] if parts else []


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
