"""Statistics of the experts' top-k lists that a gate reads. TorchScript-compatible and cheap.

B rows, E experts, K listed candidates, sorted by falling log-probability. Log-probabilities are normalised
over the full vocabulary; an absent candidate is -inf with id -1, and an absent expert is all -inf. Every
feature is finite for any such input. Knows nothing of tokens' meaning, of hidden states or of training.
"""

import torch
from torch import Tensor


def feature_count(experts: int) -> int:
    """F, the width of `topk_features` for E experts."""
    return 3 * experts + 2 * experts * experts


def topk_features(topk_logprobs: Tensor, topk_ids: Tensor) -> Tensor:
    """[B, E, K], int64 [B, E, K] -> [B, F], all in 0..1 or a few nats.

    Per expert: entropy of the listed mass with the tail as one outcome (nats), margin between the best two
    probabilities, tail mass. Per ordered pair (i, j): probability that i gives to j's best token (i = j: its
    own best probability), and whether the two best tokens agree.
    """
    rows = topk_logprobs.size(0)
    logs = topk_logprobs.clamp_min(-30.0)  # below any probability that matters; keeps p * log p finite
    probabilities = logs.exp()
    tail = (1.0 - probabilities.sum(-1)).clamp_min(1e-6)  # [B, E]
    entropy = -(probabilities * logs).sum(-1) - tail * tail.log()
    second = min(1, topk_logprobs.size(2) - 1)
    margin = probabilities[:, :, 0] - probabilities[:, :, second]
    best = topk_ids[:, :, 0]  # [B, E]
    hit = topk_ids.unsqueeze(2) == best.unsqueeze(1).unsqueeze(3)  # [B, E(i), E(j), K]
    cross = torch.where(hit, probabilities.unsqueeze(2), 0.0).sum(-1)  # [B, E, E]
    agree = (best.unsqueeze(2) == best.unsqueeze(1)).to(cross.dtype)  # [B, E, E]
    return torch.cat((entropy, margin, tail, cross.reshape(rows, -1), agree.reshape(rows, -1)), dim=1)
