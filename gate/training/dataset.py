"""Records in memory: what every expert showed at every token of graded responses, and each response's reward, as
tensors to learn from. On disk they are the shards of `gate.training.records`.

Flat tensors over tokens, in the half precision of the records: N tokens take about N * (6 E K + 8 E + 2 sum(H_i))
bytes, and loading takes no more than that and one shard. Knows nothing of models, of gates or of how responses were
made.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gate.training.records import (
    Manifest,
    RecordError,
    Response,
    SampledBy,
    open_shard,
    read_manifest,
    shards,
    tensors_sha256,
)


@dataclass(frozen=True, slots=True)
class Served:
    """The law that sampled N tokens."""

    coefficients: Tensor
    """float32 [N, E]: what was fused with."""
    log_normaliser: Tensor
    """float32 [N]: log of the sum of exp(score / temperature) over the vocabulary, at the samples' temperature."""


@dataclass(frozen=True, slots=True)
class Records:
    """R responses with N tokens in all, one response after the other. E experts, K listed ids."""

    vocabulary_size: int
    """V."""
    topk_logprobs: Tensor
    """float16 [N, E, K], best first, before the token was chosen."""
    topk_ids: Tensor
    """int32 [N, E, K]; -1 where an expert gave nothing."""
    rest: Tensor
    """float32 [N, E], log of the probability that each list leaves."""
    hidden: list[Tensor]
    """E times float16 [N, H_i], what enters each expert's output layer; empty where left out."""
    tokens: Tensor
    """int32 [N], the response's token at this position."""
    token_logprobs: Tensor
    """float32 [N, E], each expert's of that token, also of one that it did not list."""
    lengths: Tensor
    """int64 [R], tokens of each response, end token included."""
    rewards: Tensor
    """float32 [R], 0 to 1, of all of a response: nothing says which of its tokens was right."""
    prompts: list[str]
    """[R], ids."""
    served: Served | None = None
    """What sampled them, of responses that were just made for it."""

    @property
    def experts(self) -> int:
        return self.topk_ids.size(1)

    def batch(self, chosen: Tensor, device: torch.device) -> "Batch":
        """The chosen responses [B], padded on the right, in float32 on `device`."""
        starts = self.lengths.cumsum(0) - self.lengths
        steps = torch.arange(int(self.lengths[chosen].max())).unsqueeze(0)
        mask = steps < self.lengths[chosen].unsqueeze(1)
        rows = (starts[chosen].unsqueeze(1) + steps)[mask]  # [M]
        return Batch(
            vocabulary_size=self.vocabulary_size,
            topk_logprobs=self.topk_logprobs[rows].to(device).float(),
            topk_ids=self.topk_ids[rows].to(device).long(),
            rest=self.rest[rows].to(device),
            hidden=[hidden[rows].to(device).float() for hidden in self.hidden],
            tokens=self.tokens[rows].to(device).long(),
            token_logprobs=self.token_logprobs[rows].to(device),
            rewards=self.rewards[chosen].to(device),
            mask=mask.to(device),
            served=self.served
            and Served(self.served.coefficients[rows].to(device), self.served.log_normaliser[rows].to(device)),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """B responses of at most T tokens, M tokens in all."""

    vocabulary_size: int
    """V."""
    topk_logprobs: Tensor
    """float32 [M, E, K]."""
    topk_ids: Tensor
    """int64 [M, E, K]."""
    rest: Tensor
    """float32 [M, E]."""
    hidden: list[Tensor]
    """E times float32 [M, H_i], or empty."""
    tokens: Tensor
    """int64 [M]."""
    token_logprobs: Tensor
    """float32 [M, E]."""
    rewards: Tensor
    """float32 [B]."""
    mask: Tensor
    """bool [B, T], where the M tokens are."""
    served: Served | None = None
    """What sampled them, if that is known: [M]."""


def load(directory: Path, *, hidden: bool) -> tuple[Manifest, Records]:
    """All records in `directory`; `hidden`: with the hidden states. Raises RecordError if any are damaged or none
    there."""
    manifest = read_manifest(directory)
    if hidden and not manifest.hidden_sizes:
        raise RecordError(f"{directory}: recorded without hidden states (--no-hidden)")
    sizes = [_sizes(path) for path in shards(directory)]
    if not sizes:
        raise RecordError(f"{directory}: no shards; was the recording interrupted before the first?")
    filled = _Filling(manifest, sum(tokens for tokens, _ in sizes), sum(count for _, count in sizes), hidden)
    for path in shards(directory):
        filled.take(path)
    return manifest, filled.records()


def from_responses(vocabulary_size: int, responses: list[Response]) -> Records:
    """The same of responses that were just made."""

    def joined(parts: list[Any], kind: Any) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(kind))

    return Records(
        vocabulary_size=vocabulary_size,
        topk_logprobs=joined([each.topk_logprobs for each in responses], np.float16),
        topk_ids=joined([each.topk_ids for each in responses], np.int32),
        rest=joined([each.rest for each in responses], np.float32),
        hidden=[
            joined([each.hidden[index] for each in responses], np.float16) for index in range(len(responses[0].hidden))
        ],
        tokens=joined([each.tokens for each in responses], np.int32),
        token_logprobs=joined([each.token_logprobs for each in responses], np.float32),
        lengths=torch.tensor([len(each.tokens) for each in responses]),
        rewards=torch.tensor([each.reward for each in responses], dtype=torch.float32),
        prompts=[each.prompt_id for each in responses],
        served=_served([each.law for each in responses]),
    )


def _served(laws: list[SampledBy | None]) -> Served | None:
    """What sampled all of them, if that is known of all."""
    known = [law for law in laws if law is not None]
    if len(known) < len(laws):
        return None
    return Served(
        torch.from_numpy(np.concatenate([law.coefficients for law in known]).astype(np.float32)),
        torch.from_numpy(np.concatenate([law.log_normaliser for law in known]).astype(np.float32)),
    )


class _Filling:
    """Tensors for all shards, filled one shard after another."""

    def __init__(self, manifest: Manifest, tokens: int, responses: int, hidden: bool) -> None:
        listed = (tokens, len(manifest.experts), manifest.top_k)
        self._tensors = {
            "topk_logprobs": torch.empty(listed, dtype=torch.float16),
            "topk_ids": torch.empty(listed, dtype=torch.int32),
            "rest": torch.empty(listed[:2], dtype=torch.float32),
            "token_logprobs": torch.empty(listed[:2], dtype=torch.float32),
            "tokens": torch.empty(tokens, dtype=torch.int32),
            "lengths": torch.empty(responses, dtype=torch.int64),
            "rewards": torch.empty(responses, dtype=torch.float32),
        }
        for index, size in enumerate(manifest.hidden_sizes if hidden else []):
            self._tensors[f"hidden.{index}"] = torch.empty(tokens, size, dtype=torch.float16)
        self._manifest = manifest
        self._prompts: list[str] = []
        self._token = 0

    def take(self, path: Path) -> None:
        with open_shard(path) as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if missing := self._tensors.keys() - arrays.keys():
            raise RecordError(f"{path}: has no {', '.join(sorted(missing))}")
        if metadata["digest"] != tensors_sha256(arrays):
            raise RecordError(f"{path}: damaged: its contents are not what was written")
        tokens, responses = slice(self._token, self._token + len(arrays["tokens"])), len(self._prompts)
        for name, tensor in self._tensors.items():
            where = slice(responses, responses + len(arrays["lengths"])) if name in ("lengths", "rewards") else tokens
            if tensor[where].shape != arrays[name].shape:
                shapes = f"shape {arrays[name].shape}, expected {tuple(tensor[where].shape)}"
                raise RecordError(f"{path}: {name} has {shapes}")
            tensor[where] = torch.from_numpy(arrays[name])
        ids = json.loads(metadata["ids"])
        if len(ids) != len(arrays["lengths"]):
            raise RecordError(f"{path}: {len(ids)} prompts' ids for {len(arrays['lengths'])} responses")
        self._token = tokens.stop
        self._prompts += ids

    def records(self) -> Records:
        tensors = self._tensors
        return Records(
            vocabulary_size=self._manifest.vocabulary_size,
            topk_logprobs=tensors["topk_logprobs"],
            topk_ids=tensors["topk_ids"],
            rest=tensors["rest"],
            hidden=[tensors[name] for name in tensors if name.startswith("hidden.")],
            tokens=tensors["tokens"],
            token_logprobs=tensors["token_logprobs"],
            lengths=tensors["lengths"],
            rewards=tensors["rewards"],
            prompts=self._prompts,
        )


def _sizes(path: Path) -> tuple[int, int]:
    """(tokens, responses) of a shard."""
    with open_shard(path) as file:
        return file.get_slice("tokens").get_shape()[0], file.get_slice("lengths").get_shape()[0]
