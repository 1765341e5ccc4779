"""Chat templates: Hugging Face's Jinja dialect, rendered as transformers does, in a sandbox.

Templates come from the deployment's own files, never from a client. Text of a client must not turn into a
special token of the template: every special token spelled in it is replaced by a mark before rendering, and
the marks are turned back into plain text after the rendered prompt has been split (`encode`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import BadRequest, StartError
from server.text.tokenizer import Tokenizer

# Noncharacters: Unicode keeps them for internal use, no template trims or matches them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{_OPEN}([0-9a-f]{{16}})([0-9]+){_CLOSE}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; for serving it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; transformers' does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. `variables`: bos_token and the like, as the template names them."""

    def __init__(self, source: str, variables: Mapping[str, str], *, where: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise StartError(f"{where}: chat template: {error}") from None
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The prompt's text. Raises BadRequest with the template's own words where it refuses the
        conversation."""
        try:
            return self._template.render(messages=messages, **self._variables, **arguments)
        except jinja2.TemplateError as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", param="messages") from None
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError):
            raise BadRequest("the chat template cannot render these messages", param="messages") from None


class SpecialTokenEscaper:
    """Stand-ins for the special tokens that a client's text spells out, of one request.

    The random part makes them impossible to forge from outside.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_marks: int) -> None:
        """`max_marks`: how many fit a prompt, each being a token or more."""
        self._tokenizer = tokenizer
        self._left = max_marks
        self._nonce = secrets.token_hex(8)
        self.tail = f"{_OPEN}{self._nonce}{_CLOSE} "  # the space tells whether the template trims

    def escape(self, value: Any) -> Any:
        """`value` (strings in lists and dicts, keys too) with every special token replaced by its mark."""
        match value:
            case str():
                return self._tokenizer.special_pattern.sub(self._mark, value)
            case dict():
                return {self.escape(key): self.escape(item) for key, item in value.items()}
            case list():
                return [self.escape(item) for item in value]
        return value

    def unescape(self, text: str) -> str:
        """`text` with the marks turned back."""
        return _MARK.sub(self._unmark, text)

    def encode(self, rendered: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a rendered prompt: the template's special tokens parsed, the client's kept as text."""
        if _OPEN not in rendered:
            return self._tokenizer.encode([rendered], add_special_tokens=add_special_tokens)[0]
        parts: list[tuple[str, bool]] = []
        plain = ""
        for run in re.split(f"({self._tokenizer.special_pattern.pattern})", rendered):
            if _OPEN in run:
                parts += [(plain, False), (self.unescape(run), True)]
                plain = ""
            else:
                plain += run
        return self._tokenizer.encode_parts([*parts, (plain, False)], add_special_tokens=add_special_tokens)

    def cut(self, rendered: str) -> str:
        """The rendered prompt up to `tail`; without spaces before it where the template trims, as
        transformers does."""
        head, mark, rest = rendered.rpartition(self.tail.rstrip())
        if not mark:
            raise BadRequest("the chat template drops the final message", param="continue_final_message")
        return head if rest.startswith(" ") else head.rstrip()

    def _mark(self, match: re.Match[str]) -> str:
        self._left -= 1
        if self._left < 0:
            raise BadRequest("the messages are longer than the context", code="context_length_exceeded")
        return f"{_OPEN}{self._nonce}{self._tokenizer.special_tokens.index(match[0])}{_CLOSE}"

    def _unmark(self, match: re.Match[str]) -> str:
        return self._tokenizer.special_tokens[int(match[2])] if match[1] == self._nonce else match[0]
