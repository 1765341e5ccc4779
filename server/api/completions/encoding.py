"""JSON in bytes, put together from parts: of a long response, what is said of a token is encoded when it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

_LOWEST = -9999.0  # JSON has no -inf; vLLM's stand-in

encode = msgspec.json.Encoder().encode

Encoded = bytes | bytearray
"""JSON, or a part of it."""


class GrowingArrays:
    """An object of arrays that grow. Its items are encoded when they come."""

    def __init__(self) -> None:
        self._arrays: dict[str, bytearray] = {}

    def add(self, arrays: Mapping[str, Sequence[Any]]) -> None:
        for name, items in arrays.items():
            array = self._arrays.setdefault(name, bytearray())
            if items:
                array += (b"," if array else b"") + encode(items)[1:-1]

    def fields(self) -> list[Encoded]:
        """The object without its braces."""
        parts: list[Encoded] = []
        for name, array in self._arrays.items():
            parts += [b",%b:[" % encode(name) if parts else b"%b:[" % encode(name), array, b"]"]
        return parts


def after_comma(parts: list[Encoded]) -> list[Encoded]:
    return [b",", *parts] if parts else []


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
