"""Regular expressions of a client's JSON schema that would cost too much, found by reading them once.

Which constructs an expression may use is llguidance's to say (`server.api.tools.grammar`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARACTERS = 1024
MAX_REPEATS = 10_000
"""Atoms of an expression with its counted repetitions written out."""

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?P?<[^>=!]*>|\?[^<:)]*:?)?|\)|\||[*+?]|\{(\d+)(,?)(\d*)\}|.", re.DOTALL
)


@dataclass
class _Branch:
    """One alternative of a group."""

    size: int = 0
    """Atoms, with counted repetitions written out."""
    fixed: bool = False
    """Whether it has a part that occurs a bounded number of times."""
    loose: bool = False
    """Whether it has a part that may occur without end."""
    ambiguous: bool = False
    """Whether an alternative before this one was loose and not fixed."""

    @property
    def is_ambiguous(self) -> bool:
        return self.ambiguous or (self.loose and not self.fixed)

    def add(self, atom: _Atom, minimum: int, maximum: int | None) -> None:
        self.size += atom.size * max(minimum, maximum or 0, 1)
        self.fixed |= maximum is not None and minimum > 0 and not atom.ambiguous
        self.loose |= maximum is None or atom.ambiguous


@dataclass
class _Atom:
    """A character, a class of them or a group: what a quantifier repeats."""

    size: int = 1
    """Atoms in it, with counted repetitions written out."""
    ambiguous: bool = False
    """Whether one of its alternatives is a repetition without end and nothing else."""


def problem(pattern: str) -> str | None:
    """Why `pattern` is refused: too long, too many repetitions, or a repetition of nothing but repetitions, as in
    (a+)+, which matches one text in exponentially many ways. None if it is not."""
    if len(pattern) > MAX_CHARACTERS:
        return f"has more than {MAX_CHARACTERS} characters"
    groups, atom = [_Branch()], None
    for token in _TOKEN.finditer(pattern):
        bounds = _bounds(token)
        if bounds is not None and atom is not None:
            if bounds[1] is None and atom.ambiguous:
                return "repeats a repetition without end"
            groups[-1].add(atom, *bounds)
            atom = None
        elif bounds is None:
            if atom is not None:
                groups[-1].add(atom, 1, 1)
            atom = _enter(groups, token[0])
        if groups[-1].size > MAX_REPEATS:
            return f"has more than {MAX_REPEATS} repetitions"
    return None


def _enter(groups: list[_Branch], token: str) -> _Atom | None:
    """Take a token that is not a quantifier; the atom that it completes."""
    if token.startswith("(") and len(groups) <= MAX_CHARACTERS:
        groups.append(_Branch())
        return None
    if token == ")" and len(groups) > 1:
        group = groups.pop()
        return _Atom(group.size, group.is_ambiguous)
    if token == "|":
        groups[-1] = _Branch(groups[-1].size, ambiguous=groups[-1].is_ambiguous)
        return None
    return None if token in "^$" else _Atom()


def _bounds(token: re.Match[str]) -> tuple[int, int | None] | None:
    """(minimum, maximum) of a quantifier; None for any other token."""
    match token[0]:
        case "*":
            return 0, None
        case "+":
            return 1, None
        case "?":
            return 0, 1
    if token[1] is None:
        return None
    minimum = int(token[1])
    if token[3]:
        return minimum, int(token[3])
    return minimum, None if token[2] else minimum
