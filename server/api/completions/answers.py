"""One choice of an answer while it grows: tokens in, text, log-probabilities and a finish reason out.

Knows stop tokens and stop strings, not HTTP or JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.protocol import GenerationRequest
from server.request import FinishReason
from server.text.detokenize import StopStrings, TextStream
from server.text.tokenizer import Tokenizer
from server.wire.api import Choice, Ended


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer gained since the last piece. `choices` beside `tokens` when asked for, else empty."""

    text: str
    tokens: list[int]
    choices: list[Choice]


class PromptScores:
    """What is said of a prompt's own tokens but the first: a sequence of which every token is given. `index` is the
    prompt's."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._scored: list[tuple[int, Choice]] = []
        self.finish_reason: str | None = None
        self.cached_tokens = 0

    def push(self, token: int, choice: Choice | None) -> bool:
        if choice is not None:
            self._scored.append((token, choice))
        return False

    def take(self) -> list[tuple[int, Choice]]:
        """What is new since the last call, with the tokens it is said of."""
        scored, self._scored = self._scored, []
        return scored

    def end(self, ended: Ended) -> None:
        self.finish_reason = "length"


class Answer:
    """`index` is the choice's number in the response; `settled` means that only its end is missing.

    `given`: the last tokens of the prompt that come back, with what is said of them, before the answer's own; the ones
    before them are tokens without a choice. `echo`: text that the answer begins with.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        request: GenerationRequest,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        given: int,
        echo: str,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.count = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cached_tokens = 0
        self.settled = False
        self._include_stop = request.include_stop_str_in_output
        self._min_tokens = request.min_tokens
        self._max_tokens = max_tokens
        self._stop_ids = stop_token_ids
        self._reported_stops = frozenset(request.stop_token_ids)
        self._awaited = given  # tokens of the prompt that have not come back
        self._stream = TextStream(tokenizer, prompt, skip_special_tokens=request.skip_special_tokens)
        self._stops = StopStrings(request.stop, include=self._include_stop) if request.stop else None
        self._unread: int | None = None  # a stop token whose text waits for the verdict of `end`
        self._texts = [echo] if echo else []
        self._tokens = prompt[: len(prompt) - given] if given else []
        self._choices: list[Choice] = []
        self._weights: list[float] = []

    def push(self, token: int, choice: Choice | None) -> bool:
        """Take one token; True when a stop string is complete, and the sequence must be aborted."""
        self._tokens.append(token)
        if choice is not None:
            self._choices.append(choice)
        if self._awaited:
            self._awaited -= 1
            return False
        self.count += 1
        if choice is not None:
            self._add_weights(choice.coefficients)
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
        self._show(self._stream.flush())
        if self.finish_reason is not None:
            return
        if self._stops is not None:
            self._add_text(self._stops.flush())
        self.finish_reason = "length" if ended.reason is FinishReason.LENGTH else "stop"
        if ended.stop_token in self._reported_stops:
            self.stop_reason = ended.stop_token

    def take(self) -> Piece:
        """What is new since the last call."""
        piece = Piece("".join(self._texts), self._tokens, self._choices)
        self._texts, self._tokens, self._choices = [], [], []
        return piece

    @property
    def has_text(self) -> bool:
        return bool(self._texts)

    @property
    def mean_weights(self) -> Sequence[float]:
        """Each expert's mean coefficient over the tokens so far."""
        return [total / self.count for total in self._weights]

    def _read(self, token: int) -> None:
        self._show(self._stream.push(token))

    def _show(self, text: str) -> None:
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
