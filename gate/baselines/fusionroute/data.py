"""Training data of FusionRoute: prompts with reference answers, and pairs of a right and a wrong response.

Knows the chat template and tokens; nothing of models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gate.evaluation.prompts import Question, read_prompts
from gate.evaluation.results import EvaluationError, load_pairs


@dataclass(frozen=True, slots=True)
class Sequences:
    """Rows padded on the right. B rows, T tokens."""

    ids: Tensor
    """int64 [B, T]."""
    answer: Tensor
    """bool [B, T], the answer's tokens, its end included."""

    def to(self, device: str) -> "Sequences":
        return Sequences(self.ids.to(device), self.answer.to(device))


class Encoder:
    """Prompts and answers to token rows, by the experts' own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)

    def __call__(self, question: Question, answer: str) -> tuple[list[int], int]:
        """(token ids, where the answer begins)."""
        text = self._tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        prompt = self._tokenizer.encode(text, add_special_tokens=False)
        return [*prompt, *self._tokenizer.encode(answer, add_special_tokens=False), self._end], len(prompt)

    def batch(self, pairs: list[tuple[Question, str]]) -> Sequences:
        rows = [self(question, answer) for question, answer in pairs]
        ids = torch.full((len(rows), max(len(row) for row, _ in rows)), self._end)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for number, (row, start) in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            answer[number, start : len(row)] = True
        return Sequences(ids, answer)


def reference(question: Question) -> str:
    """The prompt's own answer. Raises EvaluationError if it has none."""
    if not isinstance(answer := question.row.get("answer"), str):
        raise EvaluationError(f'prompt {question.id} has no "answer" (a string) to learn from')
    return answer


def references(path: Path, limit: int | None = None) -> list[tuple[Question, str]]:
    """Every prompt, or the first `limit`, with its reference answer. Raises GateError."""
    return [(question, reference(question)) for question in read_prompts(path, limit)]


def preferences(
    prompts: Path, results: Path, rng: random.Random, limit: int | None = None
) -> list[tuple[Question, str, str]]:
    """(prompt, right response, wrong response) of every prompt, or the first `limit`, of an evaluation that has both
    kinds. A model's right answer is preferred to the reference, which stands in where no model was right.

    Raises GateError, also if `results` are of other prompts.
    """
    found, questions = load_pairs(results, prompts)
    pairs = []
    for number, question in enumerate(questions[:limit]):
        graded = [(answers.texts[number], answers.right[number]) for answers in found.models.values()]
        right = [text for text, label in graded if label] or [reference(question)]
        if wrong := [text for text, label in graded if not label]:
            pairs.append((question, rng.choice(right), rng.choice(wrong)))
    return pairs


def batches(items: list[Any], size: int, rng: random.Random) -> Iterator[list[Any]]:
    """One epoch in random order."""
    order = rng.sample(items, len(items))
    for start in range(0, len(order), size):
        yield order[start : start + size]
