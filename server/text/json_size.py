"""How much JSON a text holds, found by counting before anything is parsed: many small arrays, objects or strings take
long to parse, a long string does not. And how deep a parsed value is, for those who go through it recursively."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_STRINGS = 200_000
MAX_LEVELS = 128


def too_much(raw: bytes, containers: int) -> str | None:
    """Why `raw` is refused: more than so many arrays and objects, or very many strings. None if it is not."""
    if _containers(raw) <= containers and raw.count(b'"') <= 2 * MAX_STRINGS:
        return None
    # What brackets stand in strings? Every other quote ends one, once the escaped quotes are gone.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * MAX_STRINGS:
        return f"more than {MAX_STRINGS} strings"
    if _containers(b"".join(plain.split(b'"')[::2])) > containers:
        return f"more than {containers} arrays and objects"
    return None


def too_deep(value: dict[str, Any] | list[Any]) -> str | None:
    """Why a JSON value is refused: more than so many levels of arrays and objects. None if it is not."""
    level: list[Any] = [value]
    for _ in range(MAX_LEVELS):
        level = [item for holder in level for item in _items(holder) if isinstance(item, dict | list)]
        if not level:
            return None
    return f"more than {MAX_LEVELS} levels of nesting"


def _items(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _containers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")
