"""Chat templates: Hugging Face's Jinja dialect, rendered as transformers does, in a sandbox.

Templates come from the deployment's own files, never from a client. Text of a client must not turn into a
special token of the template: every special token spelled in it is replaced by a mark before rendering, and
the marks are turned back into plain text after the rendered prompt has been split (`encode`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.api.tokenizer import Tokenizer
from server.errors import BadRequest, StartError

# Noncharacters: Unicode keeps them for internal use, no template trims or matches them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


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


class Marks:
    """Stand-ins for the special tokens that a client's text spells out, of one request.

    The random part makes them impossible to forge from outside.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._nonce = secrets.token_hex(8)
        self._tokens = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._mark = re.compile(f"{_OPEN}{self._nonce}([0-9]+){_CLOSE}")
        self.tail = f"{_OPEN}{self._nonce}end{_CLOSE}"

    def hide(self, value: Any) -> Any:
        """`value` (strings in lists and dicts) with every special token replaced by its mark."""
        match value:
            case str():
                return self._special.sub(self._replace, value)
            case dict():
                return {key: self.hide(item) for key, item in value.items()}
            case list():
                return [self.hide(item) for item in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self._nonce}{self._tokens.index(match[0])}{_CLOSE}"

    def encode(self, rendered: str, tokenizer: Tokenizer, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a rendered prompt: the template's special tokens parsed, the client's kept as text."""
        if not self._mark.search(rendered):
            return tokenizer.encode(rendered, add_special_tokens=add_special_tokens)
        return [number for encode, text in self._parts(rendered, tokenizer) for number in encode(text)]

    def _parts(self, rendered: str, tokenizer: Tokenizer) -> list[tuple[Callable[[str], list[int]], str]]:
        """Runs of text between the template's special tokens; those with marks are encoded literally."""
        parts: list[tuple[Callable[[str], list[int]], str]] = []
        plain = ""
        for run in re.split(f"({self._special.pattern})", rendered):
            if not self._mark.search(run):
                plain += run
                continue
            if plain:
                parts.append((tokenizer.encode, plain))
            plain = ""
            parts.append((tokenizer.encode_literally, self.show(run)))
        return [*parts, (tokenizer.encode, plain)] if plain else parts

    def show(self, text: str) -> str:
        """`text` with the marks turned back."""
        return self._mark.sub(lambda match: self._tokens[int(match[1])], text)
