"""Accuracy of served models on a file of prompts, asked through an OpenAI-compatible HTTP endpoint.

Every answer is greedy, graded as a whole and kept. Knows nothing of experts, gates or how the endpoint makes its
answers; `gate.evaluation.report` makes tables and plots of what is written here.
"""

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gate.evaluation.graders import Grader
from gate.evaluation.prompts import Question
from gate.evaluation.results import Answers, EvaluationError, Results, save_results

TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ModelReply:
    """What a model answered to one question."""

    text: str
    """The answer."""
    tokens: int
    """Of the answer."""
    cut: bool
    """It ended at `max_tokens`."""


def graded(grader: Grader, questions: list[Question], replies: list[ModelReply]) -> list[int]:
    """1 for each reply that `grader` gives at least one half, else 0, as for one that was cut."""

    def reward(question: Question, reply: ModelReply) -> float:
        return 0.0 if reply.cut else grader(question.row, reply.text)

    with ThreadPoolExecutor(grader.workers) as threads:
        return [int(given >= 0.5) for given in threads.map(reward, questions, replies)]


def key_header() -> dict[str, str]:
    """What a server with API keys asks for: the one in POLYLOGIT_API_KEY, if there is one."""
    key = os.environ.get("POLYLOGIT_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


async def ask(client: httpx.AsyncClient, model: str, question: Question, max_tokens: int) -> ModelReply:
    """One greedy chat completion. The row's tools are shown, as in a recording, but what calls them is text to grade.

    Raises EvaluationError with the server's reply when refused.
    """
    body = {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": max_tokens}
    if "tools" in question.row:
        body |= {"tools": question.row["tools"], "tool_choice": "none"}
    try:
        response = await client.post("chat/completions", json=body)
    except httpx.HTTPError as error:
        raise EvaluationError(f"{client.base_url}: {error or type(error).__name__}") from None
    if response.is_error:
        raise EvaluationError(f"{model}, prompt {question.id}: {response.status_code} {response.text[:300]}")
    reply = response.json()
    choice, tokens = reply["choices"][0], reply.get("usage", {}).get("completion_tokens", 0)
    return ModelReply(choice["message"]["content"] or "", tokens, choice.get("finish_reason") == "length")


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

    async def guarded(question: Question) -> ModelReply:
        async with places:
            reply = await ask(client, model, question, max_tokens)
        progress()
        return reply

    replies = await asyncio.gather(*map(guarded, questions))
    seconds = time.perf_counter() - began
    right = await asyncio.to_thread(graded, grader, questions, replies)
    return Answers(
        texts=[reply.text for reply in replies],
        right=right,
        tokens=sum(reply.tokens for reply in replies),
        seconds=round(seconds, 2),
        served_by=model,
        cut=sum(reply.cut for reply in replies),
    )


async def served_models(client: httpx.AsyncClient) -> list[str]:
    """What the endpoint offers; of a polylogit deployment not its bare name, which is one of its NAME:POLICY. Raises
    EvaluationError."""
    try:
        response = (await client.get("models")).raise_for_status()
    except httpx.HTTPError as error:
        raise EvaluationError(f"{client.base_url}: {error or type(error).__name__}") from None
    cards = response.json()["data"]
    bare = {card.get("parent") for card in cards if card.get("owned_by") == "polylogit"}
    return [card["id"] for card in cards if card["id"] not in bare]


def labelled(models: list[str]) -> dict[str, str]:
    """`MODEL` or `MODEL=LABEL` arguments as {label: model}. Raises EvaluationError if two have one label."""
    found: dict[str, str] = {}
    for model, _, label in (argument.partition("=") for argument in models):
        if (name := label or model) in found:
            raise EvaluationError(f"--models: two rows would be labelled {name!r}")
        found[name] = model
    return found


def _missing(wanted: dict[str, str], results: Results) -> dict[str, str]:
    """Those of `wanted`, label -> model, that have no answers yet. Raises EvaluationError if a label's are another
    model's."""
    for label, model in wanted.items():
        if label in results.models and (before := results.models[label].served_by) != model:
            raise EvaluationError(
                f"the answers labelled {label!r} are of {before}, not of {model}; label one otherwise"
            )
    return {label: model for label, model in wanted.items() if label not in results.models}


async def collect_answers(
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
        missing = _missing(labelled(models or await served_models(client)), results)
        with Progress(*columns) as bar:
            for label, model in missing.items():
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
