"""Types of request fields that need more than a range: unions, text parts, objects by expert. A validator
checks the size of a value before it looks at the parts, so that a hostile body costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, Field, PlainValidator

from server.api.structure import too_deep, too_much

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MOST_STOPS, MOST_STOP_CHARACTERS = 4, 1024
MOST_MESSAGES = 4096
_MOST_CONTAINERS = 50_000  # in the arguments of all calls of a conversation
TEMPLATE_ARGUMENTS = (
    "date_string",
    "enable_thinking",
    "preserve_thinking",
    "reasoning_effort",
    "thinking",
    "thinking_budget",
)

Role = Literal["system", "developer", "user", "assistant", "tool"]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]


def _stops(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MOST_STOPS:
        raise ValueError(f"at most {MOST_STOPS} strings")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MOST_STOP_CHARACTERS:
            raise ValueError(f"must be strings of 1 to {MOST_STOP_CHARACTERS} characters")
    return tuple(strings)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > 1024:
        raise ValueError("at most 1024 entries")
    return {_token_id(key): _number(bias, -100.0, 100.0) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 19):
        raise ValueError("keys must be token ids")
    return int(key)


def _number(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"values must be numbers from {low:g} to {high:g}")
    return float(value)


def by_expert(low: float, high: float) -> PlainValidator:
    """An object of expert names and numbers."""

    def validate(value: Any) -> dict[str, float]:
        if not isinstance(value, dict) or not 0 < len(value) <= 64:
            raise ValueError("must be an object of 1 to 64 expert names and numbers")
        return {name: _number(number, low, high) for name, number in value.items()}

    return PlainValidator(validate, json_schema_input_type=dict[str, float])


def _content(value: Any) -> str | None:
    """Text, or a list of text parts: one string."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(map(_part, value))


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise ValueError("parts must be objects")
    kind = part.get("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        other = f", not {kind[:40]!r}" if isinstance(kind, str) else ""
        raise ValueError(f"only text parts are supported{other}")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError("a text part needs a string in 'text'")
    return text


def _tool_calls(value: Any) -> list[dict[str, Any]] | None:
    """An earlier turn's calls, with the arguments as objects: templates write them in their own format."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > 128:
        raise ValueError("must be a list of at most 128 calls")
    calls = [_tool_call(call) for call in value]
    if fault := too_deep(calls):
        raise ValueError(f"calls have {fault}")
    return calls


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call needs a function with a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (ValueError, RecursionError):
            raise ValueError("arguments are not valid JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def check_arguments(messages: Any) -> None:
    """Calls' arguments are JSON in strings, which the count of the body's own structure does not see. Raises
    ValueError."""
    texts = [text.encode(errors="replace") for text in _arguments(messages)]
    if fault := too_much(b"\n".join(texts), _MOST_CONTAINERS):
        raise ValueError(f"messages have tool_calls whose arguments have {fault}")


def _arguments(messages: Any) -> Iterator[str]:
    """The arguments in not yet validated messages that are strings."""
    for message in messages if isinstance(messages, list) else ():
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                yield arguments


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    if fault := too_deep(value):
        raise ValueError(f"has {fault}")
    return value


def _template_arguments(value: Any) -> dict[str, Any]:
    """A few names, plain values: the deployment's templates read nothing else of a client."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    for name, argument in value.items():
        if name not in TEMPLATE_ARGUMENTS:
            raise ValueError(f"{name[:64]!r} is not allowed; allowed are {', '.join(TEMPLATE_ARGUMENTS)}")
        if not isinstance(argument, bool | int | float) and not (isinstance(argument, str) and len(argument) <= 64):
            raise ValueError(f"{name} must be a boolean, a number or a short string")
    return value


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A string, strings, token ids or lists of them: always a list of one kind. Ids are checked later."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(value):
        raise ValueError("must be a non-empty string, or a list of strings, token ids or lists of token ids")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if kinds == {str} or kinds == {list}:
        return value
    raise ValueError("must be all strings, all token ids or all lists of token ids")


Content = Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None)]
ToolCalls = Annotated[
    list[dict[str, Any]] | None,
    PlainValidator(_tool_calls, json_schema_input_type=list[dict[str, Any]] | None),
]
Parameters = Annotated[dict[str, Any], AfterValidator(_shallow)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str])]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])]


TemplateArguments = Annotated[
    dict[str, Any], PlainValidator(_template_arguments, json_schema_input_type=dict[str, bool | float | str])
]
