"""Fusion of whole distributions, written from its definition. Imports nothing of the project.

Letters: N rows, E experts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(logprobs: Tensor, coefficients: list[float], space: str) -> Tensor:
    """Scores float64[N, V]: sum_i c_i log p_i, or log sum_i w_i p_i."""
    weights = torch.tensor(coefficients, dtype=torch.float64)[None, :, None]
    if space == "prob":
        return (weights * logprobs.exp()).sum(1).log()
    return (weights * logprobs).sum(1)


def total_variation(left: Tensor, right: Tensor) -> Tensor:
    """Half the sum of absolute differences: float64[N] of [N, V]."""
    return (left - right).abs().sum(-1) / 2
