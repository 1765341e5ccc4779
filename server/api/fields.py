"""Types of request fields that need more than a range: unions, text parts, objects by expert. A validator
checks the size of a value before it looks at the parts, so that a hostile body costs little.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 1024

TokenId = Annotated[int, Field(ge=0, le=INT64_MAX)]


def _stops(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOPS:
        raise ValueError(f"must have at most {MAX_STOPS} strings")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_CHARACTERS:
            raise ValueError(f"must be strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(strings)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > 1024:
        raise ValueError("must have at most 1024 entries")
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


Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str])]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])]
