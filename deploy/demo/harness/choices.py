"""Rows of the choice task: a few questions of every domain, each with four answers of its domain to choose from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

QUESTIONS = 10  # of each domain
CHOICES = 4


def rows(dataset: Any) -> Any:
    """A `datasets.Dataset` of `choices`, from one of prompts."""
    return type(dataset).from_list(choices(dataset))


def choices(prompts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"question", "choices", "right"} of the first prompts of each domain; the wrong choices are the answers to the
    prompts after it."""
    by_domain: dict[str, list[dict[str, Any]]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt["domain"], []).append(prompt)
    return [_row(domain[number:], number % CHOICES) for domain in by_domain.values() for number in range(QUESTIONS)]


def _row(prompts: list[dict[str, Any]], right: int) -> dict[str, Any]:
    """The first of `prompts`, its own answer at place `right`."""
    answers = list(dict.fromkeys(prompt["answer"] for prompt in prompts))[:CHOICES]
    answers[0], answers[right] = answers[right], answers[0]
    return {"question": prompts[0]["messages"][-1]["content"], "choices": answers, "right": right}
