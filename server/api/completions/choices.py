"""One choice of a response while it grows: tokens in, text, log-probabilities and a finish reason out.

Knows stop tokens and stop strings, not HTTP or JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.completions.sequences import Prompt
from server.api.protocol import GenerationRequest
from server.request import FinishReason, SequenceRequest
from server.text.detokenize import StopStrings, TextStream
from server.text.tokenizer import Tokenizer
from server.wire.api import Ended, TokenDetails


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What a choice gained since the last delta."""

    text: str
    """What can be shown already: neither half a character nor what may become a stop string."""
    tokens: list[int]
    """Ids of the tokens that came."""
    details: list[TokenDetails]
    """Of each token, when asked for; of the first tokens of an echoed prompt there are none."""


class PromptScores:
    """What is said of a prompt's own tokens but the first: a sequence of which every token is given. `index` is the
    prompt's."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._scored: list[tuple[int, TokenDetails]] = []
        self.finish_reason: str | None = None
        self.cached_tokens = 0

    def push(self, token: int, details: TokenDetails | None) -> bool:
        if details is not None:
            self._scored.append((token, details))
        return False

    def take(self) -> list[tuple[int, TokenDetails]]:
        """What is new since the last call, with the tokens it is said of."""
        scored, self._scored = self._scored, []
        return scored

    def end(self, ended: Ended) -> None:
        self.finish_reason = "length"


class ChoiceStream:
    """The choice that `sequence` generates; `index` is its number in the response.

    An echoed prompt comes first: its text, and with log-probabilities its tokens, which come back as generated ones do.
    """

    def __init__(
        self,
        *,
        index: int,
        prompt: Prompt,
        sequence: SequenceRequest,
        request: GenerationRequest,
        tokenizer: Tokenizer,
    ) -> None:
        given = len(sequence.given)
        self.index = index
        self.prompt = prompt.ids[0]
        self.count = 0  # generated tokens
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cached_tokens = 0
        self.settled = False  # whether only its end is missing
        self._include_stop = request.include_stop_str_in_output
        self._min_tokens = request.min_tokens
        self._max_tokens = sequence.max_tokens - given
        self._stop_ids = frozenset(sequence.stop_token_ids)
        self._reported_stops = frozenset(request.stop_token_ids)
        self._awaited = given  # tokens of the prompt that have not come back
        self._stream = TextStream(tokenizer, self.prompt, skip_special_tokens=request.skip_special_tokens)
        self._stops = StopStrings(request.stop, include=self._include_stop) if request.stop else None
        self._unread: int | None = None  # a stop token whose text waits for the verdict of `end`
        self._texts = [prompt.echo] if prompt.echo else []
        self._tokens = self.prompt[: len(self.prompt) - given] if given else []
        self._details: list[TokenDetails] = []
        self._weights: list[float] = []

    def push(self, token: int, details: TokenDetails | None) -> bool:
        """Take one token; True when a stop string is complete, and the sequence must be aborted."""
        self._tokens.append(token)
        if details is not None:
            self._details.append(details)
        if self._awaited:
            self._awaited -= 1
            return False
        self.count += 1
        if details is not None:
            self._add_weights(details.coefficients)
        if self._unread is not None:
            self._read(self._unread)
            self._unread = None
        if token in self._stop_ids:
            self._unread = token
        else:
            self._read(token)
        self.settled = self._unread is not None or self.count >= self._max_tokens
        return self.finish_reason is not None

    def end(self, ended: Ended) -> None:
        """Take the terminal message."""
        if self._unread is not None and (ended.stop_token is None or self._include_stop):
            self._read(self._unread)
        if self.finish_reason is not None:
            return
        self._search(self._stream.flush())
        if self.finish_reason is not None:
            return
        if self._stops is not None:
            self._add_text(self._stops.flush())
        self.finish_reason = "length" if ended.reason is FinishReason.LENGTH else "stop"
        if ended.stop_token in self._reported_stops:
            self.stop_reason = ended.stop_token

    def take(self) -> ChoiceDelta:
        """What is new since the last call."""
        delta = ChoiceDelta("".join(self._texts), self._tokens, self._details)
        self._texts, self._tokens, self._details = [], [], []
        return delta

    @property
    def has_text(self) -> bool:
        return bool(self._texts)

    @property
    def mean_weights(self) -> Sequence[float]:
        """Each expert's mean coefficient over the tokens so far."""
        return [total / self.count for total in self._weights]

    def _read(self, token: int) -> None:
        self._search(self._stream.push(token))

    def _search(self, text: str) -> None:
        """Look for stop strings in `text`, and add what is before them."""
        if self._stops is None or self.count <= self._min_tokens:
            self._add_text(text)
            return
        self._add_text(self._stops.push(text))
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found

    def _add_text(self, text: str) -> None:
        if text:
            self._texts.append(text)

    def _add_weights(self, coefficients: list[float]) -> None:
        if not self._weights:
            self._weights = [0.0] * len(coefficients)
        self._weights = [total + new for total, new in zip(self._weights, coefficients, strict=True)]
