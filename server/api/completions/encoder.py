"""What chat and text completions share of OpenAI's response shapes. Chunks are put together from bytes: this is the
code that runs for every token. What is not streamed is encoded as it grows, too: in the end it may be 100 MB.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from server.api.completions.choices import ChoiceDelta, ChoiceStream, PromptScores
from server.api.completions.encoding import Encoded, GrowingArrays, after_comma, encode, finite
from server.api.protocol import GenerationRequest
from server.api.summary import Usage
from server.text.deployment import Ensemble
from server.wire.api import TokenDetails

_SCORES = "prompt_logprobs"


@dataclass(slots=True)
class _CollectedChoice:
    """One choice so far, of a response that is not streamed."""

    texts: list[str] = field(default_factory=list)
    logprobs: GrowingArrays = field(default_factory=GrowingArrays)
    """The fields of `logprobs`."""
    beside: GrowingArrays = field(default_factory=GrowingArrays)
    """The fields beside `logprobs` that have an entry for each token."""


class ResponseEncoder(ABC):
    """Writes the response to one request: as chunks, or at once after all was collected.

    `experts`: the names that the coefficients of a token belong to.
    """

    kind: ClassVar[str]
    """OpenAI's `object`."""
    chunk_kind: ClassVar[str]
    """The same of a chunk."""

    def __init__(self, request: GenerationRequest, ensemble: Ensemble, *, identity: str, experts: list[str]) -> None:
        self.request = request
        self.tokenizer = ensemble.tokenizer
        self._about = {"id": identity, "created": int(time.time()), "model": ensemble.model}
        self._experts = experts
        self._begun: set[int] = set()  # choices that have a chunk
        self._collected: defaultdict[int, _CollectedChoice] = defaultdict(_CollectedChoice)
        self._scores: defaultdict[int, GrowingArrays] = defaultdict(_scores_of_the_first)
        self.shows_tokens = request.return_token_ids or request.expert_weights or request.alternatives is not None
        """Whether a token without text is shown too."""
        about = encode({**self._about, "object": self.chunk_kind})
        self.head = b"data: " + about[:-1] + b',"choices":['
        options = request.stream_options
        self._usage_asked = options is not None and options.include_usage
        self.usage_always = self._usage_asked and options is not None and options.continuous_usage_stats

    @abstractmethod
    def opening(self, choices: Sequence[ChoiceStream]) -> bytes:
        """The chunks before the first text."""

    @abstractmethod
    def chunk(self, choice: ChoiceStream) -> bytes:
        """The next chunk of one choice, with its finish reason if it has one."""

    def closing(self, usage: Usage) -> bytes:
        """The chunk after the last text, if the client asked for one."""
        return self.head + b'],"usage":' + encoded_usage(usage) + b"}\n\n" if self._usage_asked else b""

    @abstractmethod
    def response(self, choices: Sequence[ChoiceStream], scores: Sequence[PromptScores], usage: Usage) -> list[Encoded]:
        """All that was collected; `scores`: of each prompt, if asked for."""

    @abstractmethod
    def logprobs(self, choice: ChoiceStream, delta: ChoiceDelta) -> dict[str, list[Any]]:
        """What the client asked to know of each token, as this endpoint writes it."""

    def finish_reason(self, choice: ChoiceStream) -> str | None:
        """Why the choice ended, as this endpoint says it; None while it goes on."""
        return choice.finish_reason

    def about_prompt(self, choice: ChoiceStream) -> dict[str, Any]:
        """The fields of a choice that say what was asked."""
        return {}

    # --- chunks ---

    def end_of_choice(self, choice: ChoiceStream, delta: ChoiceDelta) -> bytes:
        """From the fields that every choice's chunk ends with to the end of the chunk."""
        extras = self._extras(choice, delta)
        end = b"," + encode(extras)[1:-1] if extras else b""
        if choice.finish_reason is None:
            end = b',"finish_reason":null' + end + b"}]"
        else:
            finish = b',"finish_reason":' + encode(self.finish_reason(choice))
            end = finish + b',"stop_reason":' + encode(choice.stop_reason) + end + b"}]"
        if self.usage_always:
            end += b',"usage":' + encoded_usage(Usage(len(choice.prompt), choice.count))
        return end + b"}\n\n"

    def _extras(self, choice: ChoiceStream, delta: ChoiceDelta) -> dict[str, Any]:
        """The fields of a choice's chunk that only some requests ask for."""
        extras = self._beside(delta)
        if choice.finish_reason is not None:
            extras |= self._mean_weights(choice)
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            extras |= self.about_prompt(choice)
        return extras

    def _beside(self, delta: ChoiceDelta) -> dict[str, Any]:
        """The fields of a choice with an entry for each token, besides `logprobs`."""
        beside: dict[str, Any] = {"token_ids": delta.tokens} if self.request.return_token_ids else {}
        if self.request.expert_weights and self.request.alternatives is None:
            beside["expert_weights"] = self.weights(delta)
        return beside

    def _mean_weights(self, choice: ChoiceStream) -> dict[str, Any]:
        if not self.request.expert_weights:
            return {}
        return {"mean_expert_weights": dict(zip(self._experts, choice.mean_weights, strict=False))}

    def weights(self, delta: ChoiceDelta) -> list[dict[str, float]]:
        return [self.weights_of(details) for details in delta.details]

    def weights_of(self, details: TokenDetails) -> dict[str, float]:
        """Expert name -> its coefficient for this token."""
        return dict(zip(self._experts, details.coefficients, strict=True))

    # --- a response that is not streamed ---

    def collect(self, reader: ChoiceStream | PromptScores) -> None:
        """Take what one choice, or one prompt's scores, gained."""
        if isinstance(reader, PromptScores):
            scored = [self._position(token, details) for token, details in reader.take()]
            self._scores[reader.index].add({_SCORES: scored})
            return
        delta, collected = reader.take(), self._collected[reader.index]
        collected.texts.append(delta.text)
        collected.beside.add(self._beside(delta))
        if self.request.alternatives is not None:
            collected.logprobs.add(self.logprobs(reader, delta))

    def text_of(self, choice: ChoiceStream) -> str:
        """All that was collected of it."""
        return "".join(self._collected[choice.index].texts)

    def choice(self, choice: ChoiceStream, said: bytes, *more: Encoded) -> list[Encoded]:
        """One choice, complete. `said`: its text or message, as a field; `more`: of its fields."""
        collected = self._collected[choice.index]
        logprobs = [b"null"] if self.request.alternatives is None else [b"{", *collected.logprobs.fields(), b"}"]
        end = b',"finish_reason":%b,"stop_reason":%b' % (encode(self.finish_reason(choice)), encode(choice.stop_reason))
        few = encode({**self._mean_weights(choice), **self.about_prompt(choice)})[1:-1]
        fields: list[Encoded] = [
            end,
            *after_comma(collected.beside.fields()),
            *after_comma([few] if few else []),
            *more,
        ]
        return [b'{"index":%d,%b,"logprobs":' % (choice.index, said), *logprobs, *fields, b"}"]

    def prompt_logprobs(self, scores: PromptScores) -> list[Encoded]:
        """A field in vLLM's form: for each token of the prompt, id -> what is said of it and of the alternatives; null
        for the first."""
        return after_comma(self._scores[scores.index].fields())

    def _position(self, token: int, details: TokenDetails) -> dict[str, Any]:
        entries = {str(token): self._ranked(token, details.logprob, details.rank)}
        for rank, (other, logprob) in enumerate(details.top, start=1):
            entries.setdefault(str(other), self._ranked(other, logprob, rank))
        return entries

    def _ranked(self, token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": self.tokenizer.shown(token).text}

    def envelope(self, choices: Sequence[list[Encoded]], usage: Usage, *more: Encoded) -> list[Encoded]:
        """The response, complete. `more`: of its fields."""
        parts: list[Encoded] = [encode({**self._about, "object": self.kind})[:-1] + b',"choices":[']
        for index, choice in enumerate(choices):
            parts += after_comma(choice) if index else choice
        return [*parts, b"]", *more, b',"usage":' + encoded_usage(usage) + b"}"]


def encoded_usage(usage: Usage) -> bytes:
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        fields["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return encode(fields)


def _scores_of_the_first() -> GrowingArrays:
    """A prompt's first token has no log-probability."""
    scores = GrowingArrays()
    scores.add({_SCORES: [None]})
    return scores
