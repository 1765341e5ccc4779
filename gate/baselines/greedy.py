"""Greedy accuracy of one transformers model on a file of prompts, for choosing settings before anything is served.

Exact match of the whole answer. The figures of a table come from `polylogit evaluate`. Knows nothing of gates.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gate.baselines.fusionroute.data import Encoder, reference
from gate.baselines.models import logits_at
from gate.evaluation.graders import Exact
from gate.evaluation.prompts import read_prompts

BATCH = 128


class Greedy:
    """A model and the prompts that it is asked; `model` may be given other weights between calls."""

    def __init__(
        self, model: Any, tokenizer: Path, prompts: Path, limit: int | None = None, *, max_tokens: int = 24
    ) -> None:
        self.model = model
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, padding_side="left")
        questions = read_prompts(prompts)
        for question in questions:
            reference(question)  # one without an answer is refused before any is asked
        spread = questions[:: max(1, len(questions) // limit)][:limit] if limit else questions
        self._questions = sorted(spread, key=lambda question: len(str(question.messages)))
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Share of right answers."""
        right, exact = 0.0, Exact()
        for start in range(0, len(self._questions), BATCH):
            batch = self._questions[start : start + BATCH]
            encoded = self._tokenizer.apply_chat_template(
                [question.messages for question in batch],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            made = self.model.generate(**encoded, do_sample=False, max_new_tokens=self._max_tokens)
            answers = self._tokenizer.batch_decode(made[:, encoded["input_ids"].size(1) :], skip_special_tokens=True)
            right += sum(exact(question.row, text) for text, question in zip(answers, batch, strict=True))
        return right / len(self._questions)

    @torch.inference_mode()
    def answer_logprob(self) -> float:
        """Mean log-probability of the whole reference answers: tells models apart where none is ever right."""
        total, encoder = 0.0, Encoder(self._tokenizer)
        for start in range(0, len(self._questions), BATCH):
            rows = encoder.batch([(q, reference(q)) for q in self._questions[start : start + BATCH]])
            logits, _ = logits_at(self.model, rows.ids[:, :-1], rows.answer[:, 1:])
            targets = rows.ids[:, 1:][rows.answer[:, 1:]]
            total += float(logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1)).sum())
        return total / len(self._questions)
