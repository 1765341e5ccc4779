"""Tokens to text, one at a time: characters split over tokens, stop strings split over tokens. Each token is
read once.

Knows nothing of requests or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from server.text.tokenizer import Tokenizer

_PROMPT_TAIL = 8  # tokens of the prompt that the first text may depend on (spaces, split characters)
_MAX_PENDING = 16  # tokens without text; no character is longer, so the bytes are not UTF-8


class TextStream:
    """The text of a growing list of tokens that follows `prompt`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._core = tokenizer.core
        self._skip = skip_special_tokens
        self._known = list(prompt[-_PROMPT_TAIL:])  # their text is out
        self._pending: list[int] = []  # theirs is not
        self._stream = DecodeStream(ids=self._known, skip_special_tokens=self._skip)

    def push(self, token: int) -> str:
        """The text that `token` completes, often all of its own."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._core, token)
        except Exception:  # the library raises bare Exception where its own prefix stops matching
            return self.flush()
        if text is None:
            return self.flush() if len(self._pending) >= _MAX_PENDING else ""
        self._known, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The text of what is pending, with U+FFFD for the bytes of an incomplete character."""
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._known, skip_special_tokens=self._skip)
        both = self._tokenizer.decode(self._known + self._pending, skip_special_tokens=self._skip)
        self._known, self._pending = self._pending, []
        self._stream = DecodeStream(ids=self._known, skip_special_tokens=self._skip)
        return both[len(before) :]


class StopStrings:
    """Finds the first stop string to be completed; holds back only text that could still become one.

    One Knuth-Morris-Pratt automaton per string: constant work for each character, whatever the strings.
    """

    def __init__(self, strings: Sequence[str], *, include: bool) -> None:
        self._strings = strings
        self._include = include
        self._failures = [_failure_table(string) for string in strings]
        self._matched = [0] * len(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The part of what was held and `text` that may be shown now. Sets `found`, and then shows nothing
        more."""
        for position, character in enumerate(text):
            for which, string in enumerate(self._strings):
                matched = self._advance(which, string, character)
                if matched == len(string):
                    return self._finish(string, self._held + text[: position + 1])
        text = self._held + text
        held = max(self._matched)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, which: int, string: str, character: str) -> int:
        matched = self._matched[which]
        while matched and string[matched] != character:
            matched = self._failures[which][matched - 1]
        if string[matched] == character:
            matched += 1
        self._matched[which] = matched
        return matched

    def _finish(self, string: str, text: str) -> str:
        self.found = string
        self._held = ""
        return text if self._include else text[: len(text) - len(string)]


def _failure_table(string: str) -> list[int]:
    """For each prefix: the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(string)
    matched = 0
    for position in range(1, len(string)):
        while matched and string[position] != string[matched]:
            matched = table[matched - 1]
        if string[position] == string[matched]:
            matched += 1
        table[position] = matched
    return table
