"""Frozen experts stepped together with transformers in float32: the reference loop behind recording.

B rows, E experts, K listed ids, U union slots. Batches are padded on the left and share one KV cache per
expert. Knows nothing of rewards, of files of records or of how a policy gets its coefficients. No network:
models come from local folders.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gate.fuse import candidates, fuse


@dataclass(frozen=True, slots=True)
class View:
    """What the experts show at one position of each row."""

    topk_logprobs: Tensor  # float32 [B, E, K], normalised over the full vocabulary, best first
    topk_ids: Tensor  # int64 [B, E, K]
    hidden: list[Tensor]  # E times float32 [B, H_i], what enters lm_head


@dataclass(frozen=True, slots=True)
class Policy:
    """A fusion space and a source of coefficients: (view, state [B, S]) -> ([B, E], state [B, S])."""

    name: str
    space: str
    coefficients: Callable[[View, Tensor], tuple[Tensor, Tensor]]
    state_size: int = 0


@dataclass(frozen=True, slots=True)
class Cursor:
    """A batch of rows in mid-generation: the last view, and what is needed to go on."""

    view: View
    caches: list[Any]  # one transformers cache per expert
    mask: Tensor  # int64 [B, tokens so far], 0 on padding

    def fork(self, copies: int) -> "Cursor":
        """An independent cursor with every row repeated `copies` times in place."""
        caches = copy.deepcopy(self.caches)
        for cache in caches:
            cache.batch_repeat_interleave(copies)
        view = View(
            self.view.topk_logprobs.repeat_interleave(copies, 0),
            self.view.topk_ids.repeat_interleave(copies, 0),
            [hidden.repeat_interleave(copies, 0) for hidden in self.view.hidden],
        )
        return Cursor(view, caches, self.mask.repeat_interleave(copies, 0))


@dataclass(frozen=True, slots=True)
class Rollout:
    """Responses of B rows and the view before each token; rows that ended early are padded."""

    tokens: Tensor  # int64 [B, T]
    lengths: Tensor  # int64 [B], end token included
    views: list[View]  # T of them


class Ensemble:
    """The experts of one deployment with their common tokenizer. E experts over one vocabulary."""

    def __init__(self, folders: dict[str, Path], top_k: int) -> None:
        self.names = list(folders)
        self.top_k = top_k
        self.tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())), local_files_only=True)
        self.models = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
            for folder in folders.values()
        ]
        self.vocabulary_size = int(self.models[0].config.vocab_size)
        self.hidden_sizes = [int(model.config.hidden_size) for model in self.models]
        self.end = int(self.tokenizer.eos_token_id)

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Prompt token ids through the experts' chat template."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of a whole response, end token included."""
        return [*self.tokenizer.encode(answer, add_special_tokens=False), self.end]

    def decode(self, tokens: list[int]) -> str:
        """Text of a response, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Cursor:
        """Runs every expert over the prompts; the view is that of each response's first token."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.end)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return self._step(ids, mask, [None] * len(self.models))

    @torch.no_grad()
    def advance(self, cursor: Cursor, tokens: Tensor) -> Cursor:
        """Appends one token per row [B]. The given cursor's caches are consumed."""
        mask = torch.cat((cursor.mask, torch.ones_like(tokens).unsqueeze(1)), dim=1)
        return self._step(tokens.unsqueeze(1), mask, cursor.caches)

    @torch.no_grad()
    def score(self, prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
        """Teacher forcing: the views before every token of given responses, in one pass per expert."""
        rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        ids = torch.full((len(rows), max(map(len, rows))), self.end)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        lengths = torch.tensor([len(response) for response in responses])
        starts = torch.tensor([len(prompt) for prompt in prompts])
        positions = starts.unsqueeze(1) + torch.arange(int(lengths.max())).unsqueeze(0)  # [B, T]
        positions = positions.clamp_max(ids.size(1) - 1)
        row_numbers = torch.arange(len(rows)).unsqueeze(1)
        states = [model.model(ids, use_cache=False).last_hidden_state for model in self.models]
        picked = [state[row_numbers, positions - 1] for state in states]  # E times [B, T, H_i]
        views = [self._view([hidden[:, t] for hidden in picked]) for t in range(positions.size(1))]
        return Rollout(ids[row_numbers, positions], lengths, views)

    def _step(self, ids: Tensor, mask: Tensor, caches: list[Any]) -> Cursor:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.size(1) :]
        common = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        outputs = [
            model.model(ids, past_key_values=cache, **common) for model, cache in zip(self.models, caches, strict=True)
        ]
        view = self._view([output.last_hidden_state[:, -1] for output in outputs])
        return Cursor(view, [output.past_key_values for output in outputs], mask)

    def _view(self, hidden: list[Tensor]) -> View:
        logits = [model.lm_head(state) for model, state in zip(self.models, hidden, strict=True)]
        best = torch.stack(logits, dim=1).log_softmax(-1).topk(self.top_k, dim=-1)
        return View(best.values, best.indices, hidden)


@torch.no_grad()
def roll_out(
    ensemble: Ensemble,
    cursor: Cursor,
    policy: Policy,
    *,
    temperature: float,
    max_tokens: int,
    generator: torch.Generator,
) -> Rollout:
    """Generates until every row has its end token or `max_tokens`; temperature 0 is greedy.

    The cursor is consumed: fork it to use it again.
    """
    rows = cursor.mask.size(0)
    state = torch.zeros(rows, policy.state_size)
    running = torch.ones(rows, dtype=torch.bool)
    lengths = torch.zeros(rows, dtype=torch.int64)
    tokens: list[Tensor] = []
    views: list[View] = []
    while len(tokens) < max_tokens and running.any():
        if tokens:
            cursor = ensemble.advance(cursor, tokens[-1])
        coefficients, state = policy.coefficients(cursor.view, state)
        union = candidates(cursor.view.topk_logprobs, cursor.view.topk_ids, ensemble.vocabulary_size)
        slots = pick(fuse(coefficients, union, policy.space), temperature, generator)
        tokens.append(union.ids.gather(1, slots.unsqueeze(1)).squeeze(1))
        views.append(cursor.view)
        lengths += running
        running &= tokens[-1] != ensemble.end
    return Rollout(torch.stack(tokens, dim=1), lengths, views)


def pick(logprobs: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One slot per row [B] of log-probabilities [B, U]; temperature 0 takes the best."""
    if temperature == 0:
        return logprobs.argmax(1)
    return (logprobs / temperature).softmax(1).multinomial(1, generator=generator).squeeze(1)


def constant_policy(name: str, space: str, coefficients: list[float]) -> Policy:
    """The same coefficients [E] at every token."""
    row = torch.tensor(coefficients)
    return Policy(name, space, lambda view, state: (row.expand(len(view.topk_ids), -1), state))


def gate_policy(name: str, space: str, gate: Any, state_size: int) -> Policy:
    """Coefficients of a gate: anything with `project` and `forward` as in `gate.checkpoint.Gate`."""

    def coefficients(view: View, state: Tensor) -> tuple[Tensor, Tensor]:
        projected = torch.stack([gate.project(i, hidden) for i, hidden in enumerate(view.hidden)], dim=1)
        result: tuple[Tensor, Tensor] = gate.forward(view.topk_logprobs, view.topk_ids, projected, state)
        return result

    return Policy(name, space, coefficients, state_size)
