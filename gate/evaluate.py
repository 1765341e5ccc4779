"""Accuracy of served models on a prompts file: `python -m gate.evaluate`.

Every answer comes through an OpenAI-compatible HTTP endpoint, greedily; a prompt is right when the whole
answer equals the expected text. Knows nothing of experts, gates or how the endpoint makes its answers.
"""

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a prompts file."""

    number: str
    domain: str
    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one model answered to one question."""

    question: Question
    text: str

    @property
    def right(self) -> bool:
        return self.text.strip() == self.question.answer.strip()


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a JSON-lines file ({"id", "domain", "messages", "answer"})."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    return [Question(row["id"], row["domain"], row["messages"], row["answer"]) for row in rows]


async def ask(client: httpx.AsyncClient, model: str, question: Question, max_tokens: int) -> Outcome:
    """One greedy chat completion. Raises httpx.HTTPStatusError with the server's reply when refused."""
    body = {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": max_tokens}
    response = await client.post("chat/completions", json=body)
    response.raise_for_status()
    return Outcome(question, response.json()["choices"][0]["message"]["content"] or "")


async def evaluate(
    client: httpx.AsyncClient, model: str, questions: list[Question], *, concurrency: int, max_tokens: int
) -> list[Outcome]:
    """All answers of one model, at most `concurrency` in flight, in the order of the questions."""
    places = asyncio.Semaphore(concurrency)

    async def guarded(question: Question) -> Outcome:
        async with places:
            return await ask(client, model, question, max_tokens)

    return list(await asyncio.gather(*map(guarded, questions)))


def accuracy(outcomes: list[Outcome]) -> dict[str, float]:
    """Share of right answers per domain, in the order in which domains first occur, then over all."""
    domains = list(dict.fromkeys(outcome.question.domain for outcome in outcomes))
    groups = {domain: [o.right for o in outcomes if o.question.domain == domain] for domain in domains}
    groups["all"] = [outcome.right for outcome in outcomes]
    return {name: sum(rights) / len(rights) for name, rights in groups.items()}


def oracle(outcomes: list[list[Outcome]]) -> list[Outcome]:
    """Per-prompt oracle routing: for each question a right answer if any of these models gave one."""
    return [next((o for o in answers if o.right), answers[0]) for answers in zip(*outcomes, strict=True)]


def markdown(table: dict[str, dict[str, float]]) -> str:
    """A Markdown table of {row: {column: share}}, two decimals."""
    columns = list(next(iter(table.values())))
    lines = [["model", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{row[column]:.2f}" for column in columns)] for name, row in table.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluates every model in turn and returns what goes to the JSON file."""
    questions = read_questions(arguments.prompts, arguments.limit)
    answers: dict[str, list[Outcome]] = {}
    seconds: dict[str, float] = {}
    async with httpx.AsyncClient(base_url=arguments.url.rstrip("/") + "/", timeout=TIMEOUT_SECONDS) as client:
        for model in arguments.models:
            began = time.perf_counter()
            answers[model] = await evaluate(
                client,
                model,
                questions,
                concurrency=arguments.concurrency,
                max_tokens=arguments.max_tokens,
            )
            seconds[model] = round(time.perf_counter() - began, 2)
            print(f"{model}: {accuracy(answers[model])} in {seconds[model]} s", flush=True)
    if arguments.oracle:
        answers["oracle routing"] = oracle([answers[name] for name in arguments.oracle])
    return {
        "prompts": str(arguments.prompts),
        "questions": len(questions),
        "accuracy": {name: accuracy(outcomes) for name, outcomes in answers.items()},
        "seconds": seconds,
        "answers": {
            name: {outcome.question.number: outcome.text for outcome in outcomes} for name, outcomes in answers.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--oracle", nargs="*", help="models between which a per-prompt oracle may choose")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON with accuracies, times and every answer")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=24)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    print(markdown(result["accuracy"]))
    if arguments.output:
        text = json.dumps(result, indent=2, ensure_ascii=False)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
