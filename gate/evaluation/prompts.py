"""Prompts files: JSON lines, each an object with "messages", perhaps "id", "domain" and "tools", and what its grader
needs ("answer", "tests", ...). One reader for recording, training and evaluation.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate.errors import GateError
from gate.evaluation.graders import Grader

NO_DOMAIN = "all prompts"


class PromptsError(GateError):
    """A prompts or responses file is wrong. The message names the line."""


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a prompts file."""

    id: str
    """The line's own "id" as text, else how many prompts stand before it; no two are the same."""
    domain: str
    """What a table groups it under."""
    messages: list[dict[str, Any]]
    """The conversation to answer, as in a chat request."""
    row: dict[str, Any]
    """All of the line, for the grader."""


def read_prompts(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` prompts of a file (None: all). Raises PromptsError naming the line."""
    found: dict[str, Question] = {}
    for line, row in numbered_rows(path, limit):
        if not isinstance(row.get("messages"), list):
            raise PromptsError(f'{path}:{line}: a prompt needs "messages" (a list)')
        if (key := _text(row, "id", str(len(found)))) in found:
            raise PromptsError(f"{path}:{line}: the id {key!r} was there before")
        found[key] = Question(key, _text(row, "domain", NO_DOMAIN), row["messages"], row)
    return list(found.values())


def check_gradable(questions: list[Question], grader: Grader) -> None:
    """Raises PromptsError for the first prompt that `grader` cannot grade responses to."""
    for question in questions:
        if problem := grader.problem(question.row):
            raise PromptsError(f"prompt {question.id!r} {problem}")


def numbered_rows(path: Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """(line, object) of the first `limit` objects in a file of JSON lines; empty lines are left out. Raises
    PromptsError."""
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(rows) == limit:
                    break
                if line.strip():
                    rows.append((number, _object(path, number, line)))
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise PromptsError(f"{path}: no lines")
    return rows


def _text(row: dict[str, Any], key: str, otherwise: str) -> str:
    return otherwise if row.get(key) is None else str(row[key])


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise PromptsError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise PromptsError(f"{path}:{number}: not a JSON object")
    return value
