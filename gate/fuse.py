"""Fusion in torch, for training: differentiable in the coefficients, and over the whole vocabulary as far as the
experts' lists tell of it.

Candidates are the union of the lists and the response's token. What lies outside of them counts with the bound that
serving has too (the coordinator's `bounds`; a test holds the two together): by Hoelder's inequality the sum of
prod_i p_i(x)^a_i, for a_i >= 0 that sum to 1, is at most prod_i (the mass that expert i leaves)^a_i. In `prob` space,
at temperature 1, it is no bound but the mass itself.

N rows, E experts, K listed ids each, U = E * (K + 1) candidates (repeats are masked), V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_MASS = 1e-9
"""Residual mass below float32's resolution of 1: what a list that holds everything leaves."""
_SMALLEST = 1e-30
"""Below it the gradient of a coefficient's logarithm, 1 / c, would leave float32: such a coefficient gets none."""
_MOST_SHIFT = 20.0
"""Nats by which a calibration may move what is outside of the candidates."""


@dataclass(frozen=True, slots=True)
class Outside:
    """The tokens outside the candidates."""

    count: Tensor
    """float32 [N]: how many."""
    mass: Tensor
    """float32 [N, E]: log of the probability that each expert gives to all of them; -inf where there is none."""
    largest: Tensor
    """float32 [N, E]: log of the most that it gives to one of them."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The union of the experts' lists and the response's token, and what each expert says of its members."""

    ids: Tensor
    """int64 [N, U]: each distinct id once; -1 in unused slots."""
    logprobs: Tensor
    """float32 [N, E, U]: log-probabilities, the tail estimate where an expert did not list the id; meaningless in
    unused slots."""
    listed: Tensor
    """bool [N, E, U]: the expert itself gave the value."""
    token_slot: Tensor
    """int64 [N]: where the response's token stands."""
    outside: Outside
    """All other tokens."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What makes the normalisers of training those that were served, at the coefficients that sampled."""

    outside: Tensor
    """float32 [N]: added to the log of what is outside of the candidates."""
    normaliser: Tensor
    """float32 [N]: added to the log of the normaliser; 0 but for rounding, where the candidates leave room for what is
    outside."""


def candidates(
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    rest: Tensor,
    tokens: Tensor,
    token_logprobs: Tensor,
    vocabulary_size: int,
) -> Candidates:
    """The union of the lists [N, E, K], of which each leaves `rest` [N, E] (log of a probability), and of the `tokens`
    [N], whose log-probabilities [N, E] are known; and every expert's log-probability of each member.

    An id missing from an expert's list gets the log of min(its k-th probability, its residual mass / number of unlisted
    tokens): the tail rule. Of an id that an expert lists twice, the last counts.
    """
    rows, experts, _ = topk_ids.shape
    ids = torch.cat((topk_ids, tokens.reshape(rows, 1, 1).expand(rows, experts, 1)), dim=2)
    values = torch.cat((topk_logprobs, token_logprobs.unsqueeze(2)), dim=2)
    union = ids.reshape(rows, -1).sort(dim=1).values
    repeats = torch.zeros_like(union, dtype=torch.bool)
    repeats[:, 1:] = union[:, 1:] == union[:, :-1]
    union = union.masked_fill(repeats, -1)
    sorted_ids, order = ids.sort(dim=2, stable=True)
    wanted = union.unsqueeze(1).expand(rows, experts, union.size(1)).contiguous()  # [N, E, U]
    slots = (torch.searchsorted(sorted_ids, wanted, right=True) - 1).clamp_min(0)
    listed = (sorted_ids.gather(2, slots) == wanted) & (wanted >= 0)
    given = values.gather(2, order).gather(2, slots)
    own = (topk_ids == tokens.reshape(rows, 1, 1)).any(2)  # [N, E]
    left = (rest.exp() - token_logprobs.exp().masked_fill(own, 0.0)).clamp_min(NO_MASS)
    smallest = topk_logprobs[:, :, -1]
    each = torch.minimum((left / (vocabulary_size - listed.sum(2)).clamp_min(1)).log(), smallest)
    return Candidates(
        ids=union,
        logprobs=torch.where(listed, given, each.unsqueeze(2)),
        listed=listed,
        token_slot=(union == tokens.unsqueeze(1)).int().argmax(1),
        outside=_outside(union, listed, left, each, smallest, vocabulary_size),
    )


def _outside(
    union: Tensor, listed: Tensor, left: Tensor, each: Tensor, smallest: Tensor, vocabulary_size: int
) -> Outside:
    """What is outside the `union` [N, U], by the mass `left` [N, E] outside each list, of which `each` [N, E] goes to
    every member that the list lacks, and by the `smallest` log-probability [N, E] of the list."""
    members = (union >= 0).sum(1, keepdim=True)
    seen = listed.sum(2)
    count = vocabulary_size - members  # [N, 1]
    # The second, never more but for rounding, cannot vanish in a difference.
    mass = torch.maximum(left - (members - seen) * each.exp(), left * count / (vocabulary_size - seen).clamp_min(1))
    most = torch.minimum(mass.log(), smallest + count.clamp_min(1).log()).masked_fill(count <= 0, -torch.inf)
    return Outside(count.squeeze(1).to(left.dtype), most, torch.minimum(smallest, most))


def fuse(
    coefficients: Tensor,
    union: Candidates,
    space: str,
    temperature: float = 1.0,
    calibration: Calibration | None = None,
) -> Tensor:
    """Log-probabilities [N, U] of the candidates under the fused distribution; -inf where a token is impossible.

    `logprob`: sum of c_i log p_i. `prob`: log of sum of w_i p_i. coefficients [N, E]; those that are 0 leave their
    expert out. `temperature` divides these scores, as where a token is sampled.

    A token to which an expert with a positive coefficient gives no probability at all is impossible in `logprob` space.
    One that an expert with a negative coefficient did not list has no upper bound and is impossible too, and so is all
    that is outside; but where that leaves nothing, the estimates have to do.
    """
    scores, outside = _all_scores(coefficients, union, space, temperature)
    if calibration is not None:
        outside = outside + calibration.outside
    excluded = scores.isneginf()
    fused = torch.cat((scores, outside.unsqueeze(1)), dim=1).log_softmax(1)[:, :-1]
    if calibration is not None:
        fused = fused - calibration.normaliser.unsqueeze(1)
    return fused.masked_fill(excluded, -torch.inf)  # where everything is excluded, the softmax was NaN


def calibrate(
    coefficients: Tensor, union: Candidates, space: str, temperature: float, log_normaliser: Tensor
) -> Calibration:
    """What gives fusions with these `coefficients` [N, E] the `log_normaliser` [N] that was served: log of the sum of
    exp(score / temperature) over the vocabulary."""
    scores, outside = _all_scores(coefficients, union, space, temperature)
    inside = scores.logsumexp(1)
    wanted = inside + (log_normaliser - inside).clamp_min(0.0).expm1().log()  # -inf where the candidates fill it
    shift = (wanted - outside).nan_to_num(0.0, _MOST_SHIFT, -_MOST_SHIFT).clamp(-_MOST_SHIFT, _MOST_SHIFT)
    return Calibration(shift, log_normaliser - torch.logaddexp(inside, outside + shift))


def _all_scores(coefficients: Tensor, union: Candidates, space: str, temperature: float) -> tuple[Tensor, Tensor]:
    """(scores / temperature [N, U], -inf where a token is impossible; the same of all that is outside [N])."""
    weights = coefficients.unsqueeze(2)  # [N, E, 1]
    possible = union.logprobs > -torch.inf
    scores, impossible = _scores(weights, union.logprobs, space)
    impossible = impossible | (union.ids < 0) | ((weights < 0) & ~possible).any(1)
    unbounded = impossible | ((weights < 0) & ~union.listed).any(1)
    excluded = torch.where(unbounded.all(1, keepdim=True), impossible, unbounded)
    return (scores / temperature).masked_fill(excluded, -torch.inf), _outside_score(
        coefficients, union.outside, space, temperature
    )


def _outside_score(coefficients: Tensor, outside: Outside, space: str, temperature: float) -> Tensor:
    """log of the most that the sum of exp(score / temperature) over all that is outside can be, [N]; -inf where nothing
    is, and where a coefficient is negative.

    With h the fused probability at exponents that sum to 1, and s what remains of the power: the sum of h^s is at most
    (largest h)^(s - 1) sum h for s >= 1, and count^(1 - s) (sum h)^s for s < 1.
    """
    both, impossible = _scores(coefficients.unsqueeze(2), torch.stack((outside.mass, outside.largest), dim=2), space)
    power = coefficients.new_full(coefficients.shape[:1], 1 / temperature)
    if space == "logprob":
        weight = coefficients.sum(1)
        weight = torch.where(weight > 0, weight, 1.0)
        both, power = both / weight.unsqueeze(1), power * weight
    mass, largest = both.unbind(1)
    count = outside.count.clamp_min(1.0).log()
    most = torch.where(power >= 1, (power - 1) * largest + mass, (1 - power) * count + power * mass)
    nothing = impossible.any(1) | (outside.count <= 0) | (coefficients < 0).any(1) | (coefficients == 0).all(1)
    return torch.minimum(most, count + power * largest).masked_fill(nothing, -torch.inf)


def _scores(weights: Tensor, logprobs: Tensor, space: str) -> tuple[Tensor, Tensor]:
    """(scores [N, U], whether a score is -inf [N, U], where the first is meaningless) by weights [N, E, 1]."""
    possible = logprobs > -torch.inf
    return (_product if space == "logprob" else _mixture)(weights, logprobs, possible)


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
