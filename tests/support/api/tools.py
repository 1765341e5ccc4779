"""Schemas, tools and calls, and what a grammar accepts of a text."""

from __future__ import annotations

from typing import Any

from llguidance import LLMatcher, LLTokenizer

from server.request import SequenceRequest
from tests.support.api.deployment import END, ids
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/count"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
ADD = '<tool_call>\n{"name": "add", "arguments": {"n": 5}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
USER: list[Any] = [{"role": "user", "content": "Hi"}]
WRONG: dict[str, Any] = {"type": "nothing"}


def schema_format(schema: Any = SCHEMA) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def accepts(vocabulary: LLTokenizer, grammar: str | None, text: str) -> bool:
    assert grammar is not None
    matcher = LLMatcher(vocabulary, grammar)
    tokens = list(text.encode())
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


def says(text: str) -> Script:
    return Script(tokens=lambda _: [*ids(text), END])


async def submitted(api: Served, **body: Any) -> SequenceRequest:
    answer = await api.chat(**body)
    assert answer.status_code == 200, answer.text
    return api.fake.submitted[0]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels - 1):
        schema = {"type": "array", "items": schema}
    return schema
