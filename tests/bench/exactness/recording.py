"""What the experts say along open-ended text: whole distributions, made once with transformers and kept in a file.

The text is sampled at temperature 1 from the uniform fusion over the whole vocabulary, so its positions are those that
a server comes to. Knows nothing of how anything is served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tests.support.oracle import rules
from tests.support.oracle.huggingface import Decision, Reference, Views

TOKENS = 20
SEED = 11
RANDOM_PROMPT_TOKENS = 12
RANDOM_PROMPT_RANGE = 250  # token ids that any of the models has
POET = "You are a poet. Answer every question in one short rhyming sentence."
TEACHER = "You are a careful teacher. Answer briefly and factually."
QUESTIONS = (
    "Tell me a story about a dragon.",
    "What should I do on a rainy Sunday?",
    "Describe a city that floats in the clouds.",
    "Write the first lines of a novel about a thief.",
    "Why do people like music?",
    "Give me ideas for a birthday party.",
    "What might the world look like in a hundred years?",
    "Tell me about your favourite place.",
    "Write a letter to somebody who moved away.",
    "Describe the taste of honey.",
    "Invent an animal and say where it lives.",
    "How would you cheer up a sad friend?",
    "Tell me a joke.",
    "What makes a good teacher?",
    "Describe a meal that you will never forget.",
    "Write a short speech for a wedding.",
    "What does the wind say?",
    "Tell me something surprising.",
    "Make up a proverb and explain it.",
    "Describe an old woman who feeds the birds.",
    "What would you take to a desert island?",
    "Write a conversation between the sun and the moon.",
    "Tell me about a day in the life of a sailor.",
    "What is courage?",
    "Describe a dream in which everything is upside down.",
)


@dataclass(frozen=True, slots=True)
class Recording:
    """N positions of text, as E experts see them."""

    name: str
    """Of the models."""
    experts: list[str]
    """E names."""
    logprobs: npt.NDArray[np.float32]
    """[N, E, V]: log-probabilities of the next token, normalised over all of them."""


def load(name: str, folder: Path, make: Callable[[], Recording]) -> Recording:
    """The recording in `folder`, or if there is none what `make` makes, which is kept there."""
    file = folder / f"{name}.npz"
    if not file.exists():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, experts=np.array(made.experts), logprobs=made.logprobs)
    with np.load(file) as kept:
        return Recording(name, kept["experts"].tolist(), kept["logprobs"])


def smollm2(models: Path) -> Recording:
    """SmolLM2 as a poet and as a teacher, and the adapter `style` of it: from the folder that deploy.smollm2 fills."""
    reference = Reference([models / "base", models / "base", models / "style"])
    prompts = [
        [
            reference.encode([{"role": "system", "content": POET}, {"role": "user", "content": question}]),
            reference.encode([{"role": "system", "content": TEACHER}, {"role": "user", "content": question}]),
            reference.encode([{"role": "user", "content": question}]),
        ]
        for question in QUESTIONS
    ]
    return Recording("smollm2", ["poet", "teacher", "style"], _recorded(reference, prompts))


def random_pair(models: Path) -> Recording:
    """The two models with random weights that tests.bench.random_model made in a folder."""
    numbers = np.random.default_rng(SEED)
    drawn = numbers.integers(RANDOM_PROMPT_RANGE, size=(len(QUESTIONS), RANDOM_PROMPT_TOKENS)).tolist()
    reference = Reference([models / "a", models / "b"])
    return Recording("random", ["a", "b"], _recorded(reference, [[prompt, prompt] for prompt in drawn]))


def _recorded(reference: Reference, prompts: list[list[list[int]]]) -> npt.NDArray[np.float32]:
    """float32[N, E, V] along `TOKENS` tokens after each of the prompts [B][E]."""
    generator = torch.Generator().manual_seed(SEED)
    experts = len(reference.models)
    uniform = rules.log_linear([1 / experts] * experts)
    steps: list[npt.NDArray[np.float32]] = []

    def keep(views: Views) -> Decision:
        steps.append(views.logprobs.float().numpy())
        return uniform(views)

    def draw(logprobs: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]

    reference.decode(prompts, keep, TOKENS, draw)
    return np.concatenate(steps)
