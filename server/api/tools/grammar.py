"""From `response_format` and forced tool calls to the grammar that every engine follows, in llguidance's Lark dialect.

What cannot be run, or would cost too much to run, is refused here, before the engines see it. A grammar is text to
everyone else.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from server.api.protocol import ChatRequest, CompletionRequest
from server.api.tools import patterns
from server.api.tools.calls import CLOSE, OPEN
from server.errors import BadRequest
from server.text.conversation import Function

Schema = dict[str, Any]

_ANSWER, _TOOLS = "response_format", "tools"
_COMPLAINT = re.compile(r"JSON schema: (.*?)\n +[0-9]+ \|", re.DOTALL)

MAX_DEPTH = 64
MAX_CHARACTERS = 200_000
_MAX_COUNTS = {
    "minItems": 10_000,
    "maxItems": 10_000,
    "minProperties": 1_000,
    "maxProperties": 1_000,
    "minLength": 1_000_000,
    "maxLength": 1_000_000,
}
_TEXT = f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/"  # without the tag that begins a call
_ANY_OBJECT: Schema = {"type": "object"}
_NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
# On one line, at most one space after a separator: small models like to go on with white space for ever.
_OPTIONS = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}


async def completion_grammar(request: CompletionRequest) -> str | None:
    """What `request` must be answered with, None for anything. Raises BadRequest."""
    if not request.response_format.constrains:
        return None
    return await asyncio.to_thread(json_grammar, request.response_format.definition)


async def chat_grammar(request: ChatRequest) -> str | None:
    """What `request` must be answered with, None for anything. Raises BadRequest."""
    tools, wanted, parallel = request.callable_tools, request.response_format, request.max_calls is None
    if request.forces_call:
        return await asyncio.to_thread(call_grammar, tools, parallel=parallel)
    if not wanted.constrains:
        free = tools and not request.ignore_eos
        return await asyncio.to_thread(call_or_text_grammar, tools, parallel=parallel) if free else None
    if tools:
        return await asyncio.to_thread(call_or_json_grammar, tools, wanted.definition, parallel=parallel)
    return await asyncio.to_thread(json_grammar, wanted.definition)


def json_grammar(schema: Schema | None) -> str:
    """JSON that `schema` describes (None: any object). Raises BadRequest."""
    return _valid(f"start: {_json(schema, _ANSWER)}\n", _ANSWER)


def call_grammar(tools: Sequence[Function], *, parallel: bool) -> str:
    """One call of one of `tools`, or several if `parallel`, as `api.tools.calls` reads them. Raises BadRequest."""
    return _valid(f"start: calls\n{_calls(tools, parallel)}", _TOOLS)


def call_or_json_grammar(tools: Sequence[Function], schema: Schema | None, *, parallel: bool) -> str:
    """Either of the above. Raises BadRequest."""
    answer, calls = _json(schema, _ANSWER), _calls(tools, parallel)
    try:
        return _valid(f"start: answer | calls\nanswer: {answer}\n{calls}", _TOOLS)
    except BadRequest:
        json_grammar(schema)  # if this is to blame, it says so
        raise


def call_or_text_grammar(tools: Sequence[Function], *, parallel: bool) -> str | None:
    """Any text, but where it begins a call, the call is one of `tools`. A schema that cannot be followed stands for any
    object, unless its tool is `strict`: then raises BadRequest. None if there is too much of it."""
    lines = ["start: call* text" if parallel else "start: call | text", "text: TEXT", _TEXT, _choice(tools)]
    for index, tool in enumerate(tools):
        head, tail = _around(tool)
        lines.append(f"call_{index}: head_{index} arguments_{index} {tail}")
        lines.append(f"head_{index}[lazy]: TEXT {head}")
        lines.append(f"arguments_{index}: {_followable(tool)}")
    grammar = "\n".join(lines) + "\n"
    if len(grammar) > MAX_CHARACTERS and not any(tool.strict for tool in tools):
        return None
    return _valid(grammar, _TOOLS)


def _followable(tool: Function) -> str:
    """A rule's right side: the tool's arguments, or any object."""
    try:
        rule = _json(_arguments(tool), _TOOLS)
        _valid(f"start: {rule}\n", _TOOLS)
    except BadRequest:
        if tool.strict:
            raise
        return _json(_ANY_OBJECT, _TOOLS)
    return rule


def _choice(tools: Sequence[Function]) -> str:
    return f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}"


def _around(tool: Function) -> tuple[str, str]:
    """What stands before and after a call's arguments."""
    head, tail = f'{OPEN}\n{{"name": {json.dumps(tool.name)}, "arguments": ', f"}}\n{CLOSE}"
    return json.dumps(head), json.dumps(tail)


def _calls(tools: Sequence[Function], parallel: bool) -> str:
    lines = [
        'calls: call ("\\n" call)*' if parallel else "calls: call",
        _choice(tools),
    ]
    for index, tool in enumerate(tools):
        head, tail = _around(tool)
        lines.append(f"call_{index}: {head} arguments_{index} {tail}")
        lines.append(f"arguments_{index}: {_json(_arguments(tool), _TOOLS)}")
    return "\n".join(lines) + "\n"


def _arguments(tool: Function) -> Schema:
    """Arguments are an object, whether or not the schema says so; without a schema there are none."""
    return _NO_ARGUMENTS if tool.parameters is None else {**tool.parameters, "type": "object"}


def _json(schema: Schema | None, param: str) -> str:
    """A rule's right side: JSON that `schema` describes."""
    if schema is None:
        schema = _ANY_OBJECT
    if fault := _fault(schema):
        raise BadRequest(f"{param}: the schema {fault}", param=param, code="invalid_schema")
    return f"%json {json.dumps({**schema, **_OPTIONS})}"


def _fault(schema: Schema) -> str | None:
    """What would cost too much, without recursion and in time linear in the schema's size."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels"
        if isinstance(value, list):
            waiting += [(item, depth + 1) for item in value if isinstance(item, dict | list)]
        else:
            if fault := _fault_of(value):
                return fault
            waiting += [(item, depth + 1) for item in value.values() if isinstance(item, dict | list)]
    return None


def _fault_of(schema: Schema) -> str | None:
    """The same of one level."""
    for name, limit in _MAX_COUNTS.items():
        if isinstance(count := schema.get(name), int | float) and count > limit:
            return f"has {name} above {limit}"
    by_pattern = schema.get("patternProperties")  # anything, where it is a property's name
    for expression in [schema.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())]:
        if isinstance(expression, str) and (fault := patterns.problem(expression)):
            return f"has a pattern that {fault}: {expression[:100]!r}"
    return None


def _valid(grammar: str, param: str) -> str:
    if len(grammar) > MAX_CHARACTERS:
        message = f"{param}: the schema is too large: its grammar has more than {MAX_CHARACTERS} characters"
        raise BadRequest(message, param=param, code="invalid_schema")
    if error := LLMatcher.validate_grammar(grammar):
        raise BadRequest(f"{param}: {_words(error)}", param=param, code="invalid_schema")
    return grammar


def _words(error: str) -> str:
    """What llguidance complains of, on one line, without the grammar around it."""
    match = _COMPLAINT.search(error)
    return " ".join((match[1] if match else error.partition("\n")[0]).split())[:500]
