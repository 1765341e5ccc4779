"""Recorded rollouts: what every expert showed at every token of a response, and the response's reward.

In memory as flat tensors over tokens, on disk as one safetensors file. Knows nothing of models, of gates or
of how responses were made.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Records:
    """R responses with N tokens in all, one response after the other. E experts, K listed ids.

    `rewards` hold whole-response correctness only; nothing here says which token was right.
    """

    experts: list[str]
    vocabulary_size: int
    topk_logprobs: Tensor  # float32 [N, E, K], best first, before the token was chosen
    topk_ids: Tensor  # int64 [N, E, K]
    hidden: list[Tensor]  # E times float32 [N, H_i], what enters each expert's lm_head
    tokens: Tensor  # int64 [N], the response's token at this position
    lengths: Tensor  # int64 [R], tokens per response, end token included
    rewards: Tensor  # float32 [R], 0 or 1
    prompts: Tensor  # int64 [R], which prompt
    sources: list[str]  # R names: the policy that wrote the response

    def save(self, path: Path) -> None:
        """Writes one safetensors file; log-probabilities and hidden states in half precision."""
        tensors = {
            "topk_logprobs": self.topk_logprobs.clamp_min(-60.0).half(),
            "topk_ids": self.topk_ids.int(),
            "tokens": self.tokens.int(),
            "lengths": self.lengths,
            "rewards": self.rewards,
            "prompts": self.prompts,
            **{f"hidden.{i}": hidden.half() for i, hidden in enumerate(self.hidden)},
        }
        notes = {"experts": self.experts, "sources": self.sources, "vocabulary_size": self.vocabulary_size}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"notes": json.dumps(notes)})

    def padded_index(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Token rows of the chosen responses [B]: (index [B, T], mask [B, T]), padded on the right."""
        starts = self.lengths.cumsum(0) - self.lengths
        width = int(self.lengths[chosen].max())
        steps = torch.arange(width).unsqueeze(0)
        mask = steps < self.lengths[chosen].unsqueeze(1)
        return (starts[chosen].unsqueeze(1) + steps).where(mask, 0), mask


def load(path: Path) -> Records:
    """Inverse of `Records.save`."""
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["notes"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Records(
        experts=notes["experts"],
        vocabulary_size=notes["vocabulary_size"],
        topk_logprobs=tensors["topk_logprobs"].float(),
        topk_ids=tensors["topk_ids"].long(),
        hidden=[tensors[f"hidden.{i}"].float() for i in range(len(notes["experts"]))],
        tokens=tensors["tokens"].long(),
        lengths=tensors["lengths"],
        rewards=tensors["rewards"],
        prompts=tensors["prompts"],
        sources=notes["sources"],
    )
