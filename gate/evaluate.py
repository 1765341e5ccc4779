"""Accuracy of served models on a file of prompts, asked through an OpenAI-compatible HTTP endpoint.

Every answer is greedy, graded as a whole and kept. Knows nothing of experts, gates or how the endpoint makes its
answers; `gate.report` makes tables and plots of what is written here.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gate.errors import GateError
from gate.graders import Grader

TIMEOUT_SECONDS = 300.0
FORMAT = 1


class EvaluationError(GateError):
    """An endpoint refuses or does not answer, or a file does not fit."""


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a prompts file; `row` is all of it, for the grader."""

    number: str
    domain: str
    messages: list[dict[str, str]]
    row: dict[str, Any]


class Answers(msgspec.Struct):
    """What one model answered to the questions, in their order. `right` holds 0 or 1."""

    texts: list[str]
    right: list[int]
    tokens: int = 0
    seconds: float = 0.0
    served_by: str = ""  # the model name that was asked


class Results(msgspec.Struct):
    """One evaluation file: the questions, and every model's answers by label."""

    prompts: str
    prompts_sha256: str
    ids: list[str]
    domains: list[str]
    grader: str
    models: dict[str, Answers] = {}
    about: dict[str, Any] = {}  # command, time, versions
    format: int = FORMAT


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a JSON-lines file: {"messages", and optionally "id", "domain", and what the grader needs}.

    Raises EvaluationError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            question = Question(str(row.get("id", number)), row.get("domain", "all prompts"), row["messages"], row)
        except (ValueError, KeyError, AttributeError) as error:
            raise EvaluationError(f"{path}:{number + 1}: not a prompt with messages: {error!r}") from None
        found.append(question)
    if not found:
        raise EvaluationError(f"{path}: holds no prompt")
    return found


def graded(grader: Grader, questions: list[Question], texts: list[str]) -> list[int]:
    """1 for each text that `grader` gives at least one half, else 0."""
    with ThreadPoolExecutor(grader.workers) as threads:
        rewards = threads.map(grader, [question.row for question in questions], texts)
        return [int(reward >= 0.5) for reward in rewards]


def new_results(path: Path, questions: list[Question], grader: str) -> Results:
    """Results without any answer yet."""
    return Results(
        prompts=str(path),
        prompts_sha256=hashlib.sha256(json.dumps([q.row for q in questions]).encode()).hexdigest(),
        ids=[question.number for question in questions],
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


def save_results(results: Results, path: Path) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(msgspec.json.encode(results) + b"\n")
    fresh.replace(path)


def key_header() -> dict[str, str]:
    """What a server with API keys asks for: the one in POLYLOGIT_API_KEY, if there is one."""
    key = os.environ.get("POLYLOGIT_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


async def ask(client: httpx.AsyncClient, model: str, question: Question, max_tokens: int) -> tuple[str, int]:
    """One greedy chat completion: (text, tokens). Raises EvaluationError with the server's reply when refused."""
    body = {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": max_tokens}
    try:
        response = await client.post("chat/completions", json=body)
    except httpx.HTTPError as error:
        raise EvaluationError(f"{client.base_url}: {error or type(error).__name__}") from None
    if response.is_error:
        raise EvaluationError(f"{model}, prompt {question.number}: {response.status_code} {response.text[:300]}")
    reply = response.json()
    return reply["choices"][0]["message"]["content"] or "", reply.get("usage", {}).get("completion_tokens", 0)


async def answers(
    client: httpx.AsyncClient,
    model: str,
    questions: list[Question],
    grader: Grader,
    *,
    concurrency: int,
    max_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> Answers:
    """All answers of one model, at most `concurrency` in flight. Raises EvaluationError."""
    places = asyncio.Semaphore(concurrency)
    began = time.perf_counter()

    async def guarded(question: Question) -> tuple[str, int]:
        async with places:
            reply = await ask(client, model, question, max_tokens)
        progress()
        return reply

    replies = await asyncio.gather(*map(guarded, questions))
    seconds = time.perf_counter() - began
    texts = [text for text, _ in replies]
    right = await asyncio.to_thread(graded, grader, questions, texts)
    return Answers(texts, right, sum(tokens for _, tokens in replies), round(seconds, 2), model)


async def served_models(client: httpx.AsyncClient) -> list[str]:
    """What the endpoint offers. Raises EvaluationError."""
    try:
        response = (await client.get("models")).raise_for_status()
    except httpx.HTTPError as error:
        raise EvaluationError(f"{client.base_url}: {error or type(error).__name__}") from None
    return [model["id"] for model in response.json()["data"]]


def labelled(models: list[str]) -> dict[str, str]:
    """`MODEL` or `MODEL=LABEL` arguments as {label: model}."""
    pairs = [argument.partition("=") for argument in models]
    return {label or model: model for model, _, label in pairs}


async def evaluate(
    url: str,
    models: list[str],
    questions: list[Question],
    grader: Grader,
    results: Results,
    output: Path,
    *,
    concurrency: int,
    max_tokens: int,
) -> None:
    """Asks every model that `results` does not hold yet, and writes `output` after each. Raises EvaluationError."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    base = url.rstrip("/") + "/"
    async with httpx.AsyncClient(base_url=base, headers=key_header(), timeout=TIMEOUT_SECONDS) as client:
        wanted = labelled(models or await served_models(client))
        with Progress(*columns) as bar:
            for label, model in wanted.items():
                if label in results.models:
                    continue
                task = bar.add_task(label, total=len(questions))
                results.models[label] = await answers(
                    client,
                    model,
                    questions,
                    grader,
                    concurrency=concurrency,
                    max_tokens=max_tokens,
                    progress=lambda task=task: bar.advance(task),  # type: ignore[misc]
                )
                save_results(results, output)
