"""Fusion of truncated distributions in torch, for recording and training. Differentiable in the coefficients.

The serving coordinator has its own implementation; both follow the same definition. N rows, E experts, K
listed ids each, U = E * K candidates (the union of the lists; repeats are masked).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """The union of the experts' lists: each distinct id once, the other slots are id -1."""

    ids: Tensor  # int64 [N, U]; -1 in unused slots
    logprobs: Tensor  # float32 [N, E, U]; finite everywhere, meaningless in unused slots


def candidates(topk_logprobs: Tensor, topk_ids: Tensor, vocabulary_size: int) -> Candidates:
    """The union of the lists [N, E, K] and every expert's log-probability of each member.

    An id missing from an expert's list gets the log of min(its k-th probability, its residual mass / number
    of unlisted tokens): the tail rule.
    """
    rows, experts, listed = topk_ids.shape
    union, order = topk_ids.reshape(rows, -1).sort(dim=1)
    repeats = torch.zeros_like(union, dtype=torch.bool)
    repeats[:, 1:] = union[:, 1:] == union[:, :-1]
    union = union.masked_fill(repeats, -1)
    sorted_ids, order = topk_ids.sort(dim=2)
    sorted_logprobs = topk_logprobs.gather(2, order)
    wanted = union.unsqueeze(1).expand(rows, experts, union.size(1)).contiguous()  # [N, E, U]
    slots = torch.searchsorted(sorted_ids, wanted).clamp_max(listed - 1)
    found = sorted_ids.gather(2, slots) == wanted
    residual = (1.0 - topk_logprobs.exp().sum(2)).clamp_min(1e-9) / max(1, vocabulary_size - listed)
    tail = torch.minimum(residual.log(), topk_logprobs[:, :, -1].clamp_min(-60.0))  # [N, E]
    logprobs = torch.where(found, sorted_logprobs.gather(2, slots).clamp_min(-60.0), tail.unsqueeze(2))
    return Candidates(union, logprobs)


def fuse(coefficients: Tensor, union: Candidates, space: str, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [N, U] of the fused distribution, normalised over the union; -inf in unused slots.

    `logprob`: sum of c_i log p_i. `prob`: log of sum of w_i p_i. coefficients [N, E]. `temperature` divides these
    scores, as where a token is drawn.
    """
    if space == "logprob":
        scores = (coefficients.unsqueeze(2) * union.logprobs).sum(1)
    else:
        scores = (coefficients.clamp_min(1e-12).log().unsqueeze(2) + union.logprobs).logsumexp(1)
    return (scores / temperature).masked_fill(union.ids < 0, -torch.inf).log_softmax(1)


def token_slots(union: Candidates, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(slot [N] of each token in its union, whether it is there [N])."""
    hits = union.ids == tokens.unsqueeze(1)
    return hits.int().argmax(1), hits.any(1)
