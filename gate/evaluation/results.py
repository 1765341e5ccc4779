"""Evaluation files: the questions that were asked, and every model's answers with how each was graded.

Knows nothing of endpoints, or of how answers were made.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from gate.errors import GateError
from gate.evaluation.prompts import Question, read_prompts
from gate.files import write_whole

FORMAT = 1


class EvaluationError(GateError):
    """An endpoint refuses or does not answer, or a file does not fit."""


class Answers(msgspec.Struct):
    """What one model answered to the questions, in their order. Q questions."""

    texts: list[str]
    """[Q]."""
    right: list[int]
    """[Q], 0 or 1."""
    tokens: int = 0
    """Of all answers."""
    seconds: float = 0.0
    """From the first request to the last answer."""
    served_by: str = ""
    """The model name that was asked."""
    cut: int = 0
    """Answers that ended at `max_tokens`: wrong, whatever they say."""


class Results(msgspec.Struct):
    """One evaluation file: Q questions, and every model's answers by label."""

    prompts: str
    """Path of the prompts file."""
    prompts_sha256: str
    """`questions_sha256` of the questions that were asked."""
    ids: list[str]
    """[Q], of the questions."""
    domains: list[str]
    """[Q], of the questions."""
    grader: str
    """As given to `--grader`."""
    models: dict[str, Answers] = {}
    """Label -> answers."""
    about: dict[str, Any] = {}
    """Command, time, versions, and what the answers depend on."""
    format: int = FORMAT
    """`FORMAT` of the program that wrote it."""


def questions_sha256(questions: list[Question]) -> str:
    """sha256 (hexadecimal) of all that their lines say."""
    return hashlib.sha256(json.dumps([question.row for question in questions]).encode()).hexdigest()


def new_results(path: Path, questions: list[Question], grader: str) -> Results:
    """Results without any answer yet."""
    return Results(
        prompts=str(path),
        prompts_sha256=questions_sha256(questions),
        ids=[question.id for question in questions],
        domains=[question.domain for question in questions],
        grader=grader,
    )


def load_results(path: Path) -> Results:
    """Inverse of `save_results`. Raises EvaluationError."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.DecodeError) as error:
        raise EvaluationError(f"{path}: no readable results: {error}") from None
    if results.format != FORMAT:
        raise EvaluationError(f"{path}: format {results.format}, this program reads {FORMAT}")
    return results


def load_pairs(path: Path, prompts: Path) -> tuple[Results, list[Question]]:
    """The results at `path` and the questions that they answer. Raises EvaluationError if `prompts` holds others."""
    results = load_results(path)
    questions = read_prompts(prompts, len(results.ids))
    if questions_sha256(questions) != results.prompts_sha256:
        raise EvaluationError(f"{prompts}: not the prompts that {path} answers (those were {results.prompts})")
    return results, questions


def save_results(results: Results, path: Path) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, msgspec.json.encode(results) + b"\n")
