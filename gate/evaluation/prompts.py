"""Prompts files: JSON lines, each an object with "id" and "messages", and what its grader needs ("answer", "tests",
...)."""

import json
from pathlib import Path
from typing import Any

from gate.errors import GateError
from gate.evaluation.graders import Grader


class PromptsError(GateError):
    """A prompts or responses file is wrong. The message names the line."""


def read_prompts(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a prompts file (None: all). Raises PromptsError."""
    rows = numbered_rows(path, limit)
    seen: set[str] = set()
    for number, row in rows:
        if not isinstance(row.get("id"), str) or not isinstance(row.get("messages"), list):
            raise PromptsError(f'{path}:{number}: a prompt needs "id" (a string) and "messages" (a list)')
        if row["id"] in seen:
            raise PromptsError(f"{path}:{number}: the id {row['id']!r} was there before")
        seen.add(row["id"])
    return [row for _, row in rows]


def check_gradable(rows: list[dict[str, Any]], grader: Grader) -> None:
    """Raises PromptsError for the first row that `grader` cannot grade responses to."""
    for row in rows:
        if problem := grader.problem(row):
            raise PromptsError(f"prompt {row['id']!r} {problem}")


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


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise PromptsError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise PromptsError(f"{path}:{number}: not a JSON object")
    return value
