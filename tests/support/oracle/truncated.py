"""Fusion of truncated distributions, written from its definition. Imports nothing of the project.

Candidates are the union of the experts' k most probable tokens. The result is normalised over the candidates.
Letters: N rows, E experts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fuse(logprobs: Tensor, k: int, coefficients: list[float], space: str) -> Tensor:
    """Probabilities float64[N, V] of fusing `logprobs` float64[N, E, V]; 0 for tokens that are no candidates."""
    best = logprobs.topk(k, dim=-1)
    listed = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, best.indices, True)
    candidates = listed.any(1)
    scores = combine(logprobs, coefficients, space).masked_fill(~candidates, -torch.inf)
    return scores.softmax(-1)


def combine(logprobs: Tensor, coefficients: list[float], space: str) -> Tensor:
    """Scores float64[N, V]: sum_i c_i log p_i, or log sum_i w_i p_i."""
    weights = torch.tensor(coefficients, dtype=torch.float64)[None, :, None]
    if space == "prob":
        return (weights * logprobs.exp()).sum(1).log()
    return (weights * logprobs).sum(1)


def total_variation(left: Tensor, right: Tensor) -> Tensor:
    """Half the sum of absolute differences: float64[N] of [N, V]."""
    return (left - right).abs().sum(-1) / 2
