"""The oracle: several causal language models fused with Hugging Face transformers, float32, over the full vocabulary.

Its own plain loop, batched with left padding. Imports nothing of the project, so that it shares no mistake with it.
Letters: B rows, E experts, V vocabulary, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


@dataclass
class Views:
    """What the experts say in one step: `logprobs` float64[B, E, V]; `hidden`: float32[B, H] after the final norm."""

    logprobs: Tensor
    hidden: list[Tensor]


@dataclass
class Decision:
    """A rule's answer: fused `logprobs` float64[B, V] (normalised), `coefficients` float64[B, E].

    `slack` float64[B]: by how much the inputs of a discrete choice inside the rule may change before it changes.
    """

    logprobs: Tensor
    coefficients: Tensor
    slack: Tensor


Rule = Callable[[Views], Decision]
Pick = Callable[[Tensor], Tensor]
"""Fused log-probabilities float64[B, V] in, a token int64[B] for each row out."""


@dataclass
class Decoded:
    """A decoding run: `tokens` int64[B, T], `logprobs` float64[B, T, V], `coefficients` float64[B, T, E], `slack`
    float64[B, T]."""

    tokens: Tensor
    logprobs: Tensor
    coefficients: Tensor
    slack: Tensor


def greedy(logprobs: Tensor) -> Tensor:
    """The most probable token of each row."""
    return logprobs.argmax(-1)


class Reference:
    """The experts in directories `paths`, which share a tokenizer."""

    def __init__(self, paths: list[Path]) -> None:
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(paths[0])
        self.models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths]

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation as prompt token ids."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    @torch.inference_mode()
    def decode(self, prompts: list[list[list[int]]], rule: Rule, length: int, pick: Pick = greedy) -> Decoded:
        """Decode `length` tokens; `prompts[b][e]` is row b's prompt for expert e."""
        readers = [_Reader(model, [row[index] for row in prompts]) for index, model in enumerate(self.models)]
        steps: list[tuple[Tensor, Decision]] = []
        for _ in range(length):
            views = Views(torch.stack([reader.logprobs for reader in readers], 1), [r.hidden for r in readers])
            decision = rule(views)
            token = pick(decision.logprobs)
            steps.append((token, decision))
            for reader in readers:
                reader.read(token)
        return Decoded(
            torch.stack([token for token, _ in steps], 1),
            torch.stack([decision.logprobs for _, decision in steps], 1),
            torch.stack([decision.coefficients for _, decision in steps], 1),
            torch.stack([decision.slack for _, decision in steps], 1),
        )

    @torch.inference_mode()
    def along(self, prompts: list[list[int]], tokens: list[int]) -> Views:
        """Teacher-forced: what the experts say after each one's own prompt, before each of `tokens`, which are B."""
        hidden = [
            model.model(torch.tensor([prompt + tokens[:-1]])).last_hidden_state[0, len(prompt) - 1 :]
            for model, prompt in zip(self.models, prompts, strict=True)
        ]
        said = [model.lm_head(rows).double().log_softmax(-1) for model, rows in zip(self.models, hidden, strict=True)]
        return Views(torch.stack(said, 1), hidden)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> Tensor:
        """Teacher-forced: float64[E, T, V], what follows each prefix of `tokens`."""
        inputs = torch.tensor([tokens])
        return torch.stack([model(inputs).logits[0].double().log_softmax(-1) for model in self.models])

    def cross_entropy(self, prompt: list[int], expert: int) -> float:
        """Mean nats for each token of `prompt` but the first, under one expert."""
        following = self.logprobs(prompt)[expert, :-1]
        return float(-following.gather(1, torch.tensor(prompt[1:])[:, None]).mean())


class _Reader:
    """One model reading a left-padded batch. `logprobs`, `hidden`: after what was read last."""

    def __init__(self, model: torch.nn.Module, prompts: list[list[int]]) -> None:
        self._model = model
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        self._mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self._cache = None
        self._forward(ids, (self._mask.cumsum(1) - 1).clamp(min=0))

    def read(self, token: Tensor) -> None:
        """One more token int64[B]."""
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._forward(token[:, None], self._mask.sum(1, keepdim=True) - 1)

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        output = self._model.model(
            ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        self._cache = output.past_key_values
        self.hidden = output.last_hidden_state[:, -1]
        self.logprobs = self._model.lm_head(self.hidden).double().log_softmax(-1)
