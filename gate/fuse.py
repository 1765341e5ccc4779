"""Fusion of truncated distributions in torch, for training: differentiable in the coefficients.

The same definition as the one that serves (`combine`, `fill_tail` and `tabulate` in the coordinator's fusion, where it
is compiled); a property test holds the two together. N rows, E experts, K listed ids each, U = E * K candidates (the
union of the lists; repeats are masked).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_MASS = 1e-9
"""Residual mass below float32's resolution of 1: what a list that holds everything leaves."""
_SMALLEST = 1e-30
"""Below it the gradient of a coefficient's logarithm, 1 / c, would leave float32: such a coefficient gets none."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The union of the experts' lists, and what each expert says of its members."""

    ids: Tensor
    """int64 [N, U]: each distinct id once; -1 in unused slots."""
    logprobs: Tensor
    """float32 [N, E, U]: log-probabilities, the tail estimate where an expert did not list the id; meaningless in
    unused slots."""
    listed: Tensor
    """bool [N, E, U]: the expert itself gave the value."""


def candidates(topk_logprobs: Tensor, topk_ids: Tensor, vocabulary_size: int) -> Candidates:
    """The union of the lists [N, E, K] and every expert's log-probability of each member.

    An id missing from an expert's list gets the log of min(its k-th probability, its residual mass / number of unlisted
    tokens): the tail rule. Of an id that an expert lists twice, the last counts.
    """
    rows, experts, _ = topk_ids.shape
    union = topk_ids.reshape(rows, -1).sort(dim=1).values
    repeats = torch.zeros_like(union, dtype=torch.bool)
    repeats[:, 1:] = union[:, 1:] == union[:, :-1]
    union = union.masked_fill(repeats, -1)
    sorted_ids, order = topk_ids.sort(dim=2, stable=True)
    wanted = union.unsqueeze(1).expand(rows, experts, union.size(1)).contiguous()  # [N, E, U]
    slots = (torch.searchsorted(sorted_ids, wanted, right=True) - 1).clamp_min(0)
    listed = (sorted_ids.gather(2, slots) == wanted) & (wanted >= 0)
    given = topk_logprobs.gather(2, order).gather(2, slots)
    mass = given.exp().masked_fill(~listed, 0.0).sum(2)  # [N, E]
    unlisted = (vocabulary_size - listed.sum(2)).clamp_min(1)
    tail = torch.minimum(((1.0 - mass).clamp_min(NO_MASS) / unlisted).log(), topk_logprobs[:, :, -1])
    return Candidates(union, torch.where(listed, given, tail.unsqueeze(2)), listed)


def fuse(coefficients: Tensor, union: Candidates, space: str, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [N, U] of the fused distribution, normalised over the union; -inf where a token is impossible.

    `logprob`: sum of c_i log p_i. `prob`: log of sum of w_i p_i. coefficients [N, E]; those that are 0 leave their
    expert out. `temperature` divides these scores, as where a token is sampled.

    A token to which an expert with a positive coefficient gives no probability at all is impossible in `logprob` space.
    One that an expert with a negative coefficient did not list has no upper bound and is impossible too; but where that
    leaves nothing, the estimates have to do.
    """
    weights = coefficients.unsqueeze(2)  # [N, E, 1]
    possible = union.logprobs > -torch.inf
    score = _product if space == "logprob" else _mixture
    scores, impossible = score(weights, union.logprobs, possible)
    impossible = impossible | (union.ids < 0) | ((weights < 0) & ~possible).any(1)
    unbounded = impossible | ((weights < 0) & ~union.listed).any(1)
    excluded = torch.where(unbounded.all(1, keepdim=True), impossible, unbounded)
    fused = (scores / temperature).masked_fill(excluded, -torch.inf).log_softmax(1)
    return fused.masked_fill(excluded, -torch.inf)  # where everything is excluded, the softmax was NaN


def _product(weights: Tensor, logprobs: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of c_i log p_i [N, U], whether an expert with weight forbids the token [N, U])."""
    # Not 0 * -inf, whose value and gradient are NaN.
    finite = logprobs.masked_fill(~possible | (weights == 0), 0.0)
    return (weights * finite).sum(1), ((weights > 0) & ~possible).any(1)


def _mixture(weights: Tensor, logprobs: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """(log of sum of w_i p_i [N, U], whether that sum is not positive [N, U]), in terms that do not underflow."""
    used = possible & (weights != 0)
    sizes = torch.where(weights.abs() < _SMALLEST, weights.detach(), weights).abs()
    logs = sizes.masked_fill(weights == 0, 1.0).log() + logprobs.masked_fill(~used, 0.0)
    terms = logs.masked_fill(~used, -torch.inf)
    highest = terms.detach().amax(1, keepdim=True).clamp_min(torch.finfo(terms.dtype).min)  # [N, 1, U]
    total = (weights.sign() * (terms - highest).exp()).sum(1)
    empty = total <= 0
    return highest.squeeze(1) + total.masked_fill(empty, 1.0).log(), empty


def token_slots(union: Candidates, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(slot [N] of each token in its union, whether it is there [N])."""
    hits = union.ids == tokens.unsqueeze(1)
    return hits.int().argmax(1), hits.any(1)
