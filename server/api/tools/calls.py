"""Tool calls in a growing text, in the format of Hermes and Qwen:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>

Text in, content and parts of calls out; each character is read once. Does not know tokens, requests or HTTP.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MAX_HEAD = 1024
"""Characters in which a call's name must be complete to be shown before its end."""
_NOTABLE = re.compile(r'["\\{}]')


@dataclass(slots=True)
class ToolCallDelta:
    """What one call gained."""

    index: int
    """Of the call, in its message."""
    identity: str | None = None
    """Comes once, with the first delta of the call."""
    name: str | None = None
    """The function's; comes once, with the first delta of the call."""
    arguments: str = ""
    """JSON text."""

    def shown(self) -> dict[str, Any]:
        """As OpenAI writes it in a chunk."""
        function: dict[str, Any] = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        function = {"name": self.name, **function}
        return {"index": self.index, "id": self.identity, "type": "function", "function": function}


@dataclass(slots=True)
class MessageDelta:
    """What a message gained with a piece of text."""

    content: str = ""
    """Text outside of calls."""
    calls: list[ToolCallDelta] = field(default_factory=list)
    """One for each call that grew, in order."""

    def joined(self, later: MessageDelta) -> MessageDelta:
        """Both; `later` is what a flush gave, which grows no call that had begun."""
        return MessageDelta(self.content + later.content, self.calls + later.calls)

    def call(self, index: int) -> ToolCallDelta:
        if not self.calls or self.calls[-1].index != index:
            self.calls.append(ToolCallDelta(index))
        return self.calls[-1]


class _Place(Enum):
    CONTENT = auto()
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()


class CallStream:
    """Reads one answer. `max_calls`: calls after so many are left out. `count` is how many there have been.

    What stands between the tags and is not a call stays content.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self.count = 0
        self._max_calls = max_calls
        self._place = _Place.CONTENT
        self._text = ""  # not yet shown
        self._searched = 0  # characters of it that cannot begin CLOSE
        self._behind_call = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> MessageDelta:
        """What `text` adds."""
        gained = MessageDelta()
        self._text += text
        while self._step(gained):
            pass
        return self._limited(gained)

    def flush(self) -> MessageDelta:
        """What was held back, when no more text comes."""
        gained = MessageDelta()
        if self._place is _Place.CONTENT:
            self._show(gained, self._text)
        elif self._place is _Place.HEAD:
            self._complete(gained, self._text, closed=False)
        self._text = ""
        return self._limited(gained)

    def _step(self, gained: MessageDelta) -> bool:
        """Read on in the current place; whether it was left for another."""
        match self._place:
            case _Place.CONTENT:
                return self._read_content(gained)
            case _Place.HEAD:
                return self._read_head(gained)
            case _Place.ARGUMENTS:
                return self._read_arguments(gained)
            case _Place.TAIL:
                return self._read_tail()

    def _read_content(self, gained: MessageDelta) -> bool:
        before, tag, after = self._text.partition(OPEN)
        if tag:
            self._show(gained, before)
            return self._go(_Place.HEAD, after)
        held = _overlap(self._text, OPEN)
        self._show(gained, self._text[: len(self._text) - held])
        self._text = self._text[len(self._text) - held :]
        return False

    def _read_head(self, gained: MessageDelta) -> bool:
        match = _HEAD.match(self._text) if self._searched < _MAX_HEAD else None
        if match is not None and (name := _decoded(match[1])) is not None:
            self._begin(gained, name)
            self._depth, self._in_string, self._escaped = 0, False, False
            return self._go(_Place.ARGUMENTS, self._text[match.end() :])
        end = self._text.find(CLOSE, self._searched)
        if end < 0:
            self._searched = max(0, len(self._text) - len(CLOSE) + 1)
            return False
        self._complete(gained, self._text[:end], closed=True)
        return self._go(_Place.CONTENT, self._text[end + len(CLOSE) :])

    def _read_arguments(self, gained: MessageDelta) -> bool:
        end = self._end_of_object()
        text = self._text if end is None else self._text[:end]
        if text:
            gained.call(self.count - 1).arguments += text
        if end is None:
            self._text = ""
            return False
        return self._go(_Place.TAIL, self._text[end:])

    def _read_tail(self) -> bool:
        """Skip what follows the arguments up to the closing tag."""
        _, tag, after = self._text.partition(CLOSE)
        if tag:
            return self._go(_Place.CONTENT, after)
        self._text = self._text[-len(CLOSE) :]
        return False

    def _end_of_object(self) -> int | None:
        """Where the arguments end in the text, None if further on."""
        position = int(self._escaped and bool(self._text))
        self._escaped = self._escaped and not self._text
        while (match := _NOTABLE.search(self._text, position)) is not None:
            position = match.end()
            if match[0] == "\\":
                self._escaped = position == len(self._text)
                position += 1
            elif match[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if match[0] == "{" else -1
                if not self._depth:
                    return position
        return None

    def _complete(self, gained: MessageDelta, text: str, *, closed: bool) -> None:
        """A call in another order of keys; or no call at all."""
        call = _decoded(text)
        name = call.get("name") if isinstance(call, dict) else None
        arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
        if isinstance(name, str) and isinstance(arguments, dict):
            self._begin(gained, name)
            gained.call(self.count - 1).arguments = msgspec.json.encode(arguments).decode()
        else:
            self._show(gained, OPEN + text + (CLOSE if closed else ""))

    def _begin(self, gained: MessageDelta, name: str) -> None:
        call = gained.call(self.count)
        call.identity, call.name = f"call_{secrets.token_hex(12)}", name
        self.count += 1
        self._behind_call = True

    def _show(self, gained: MessageDelta, text: str) -> None:
        """White space behind a call is not content."""
        if self._behind_call:
            text = text.lstrip()
        if text:
            gained.content += text
            self._behind_call = False

    def _go(self, place: _Place, text: str) -> bool:
        self._place, self._text, self._searched = place, text, 0
        return True

    def _limited(self, gained: MessageDelta) -> MessageDelta:
        if self._max_calls is not None:
            gained.calls = [call for call in gained.calls if call.index < self._max_calls]
        return gained


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((length for length in range(longest, 0, -1) if tag.startswith(text[-length:])), 0)


def _decoded(text: str) -> Any:
    """JSON, or None for what is not."""
    try:
        return msgspec.json.decode(text.strip())
    except (ValueError, RecursionError):
        return None
