"""How much JSON a text holds, found by counting: many small arrays, objects or strings take long to make, a long string
does not. Looked at before anything is made."""

from __future__ import annotations

MOST_STRINGS = 200_000


def too_much(raw: bytes, containers: int) -> str | None:
    """Why `raw` is refused: more than so many arrays and objects, or very many strings. None if it is not."""
    if _containers(raw) <= containers and raw.count(b'"') <= 2 * MOST_STRINGS:
        return None
    # What brackets stand in strings? Every other quote ends one, once the escaped quotes are gone.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 2 * MOST_STRINGS:
        return f"more than {MOST_STRINGS} strings"
    if _containers(b"".join(plain.split(b'"')[::2])) > containers:
        return f"more than {containers} arrays and objects"
    return None


def _containers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")
