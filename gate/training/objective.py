"""The gate applied to recorded responses, and the two response-level objectives. Experts stay frozen.

Neither objective sees a token label: only the correctness of a whole response. Knows nothing of files, of
models' weights or of how responses were made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gate.fuse import Calibration, Candidates, calibrate, candidates, fuse
from gate.model import GateModel
from gate.training.dataset import Batch, Served


def gate_coefficients(model: GateModel, batch: Batch) -> Tensor:
    """Coefficients [M, E] of every token of a batch; state starts at zero with each response."""
    projected = batch.topk_logprobs.new_zeros(len(batch.tokens), batch.topk_ids.size(1), model.projected_size)
    if model.projected_size:
        projected = torch.stack([model.project(i, hidden) for i, hidden in enumerate(batch.hidden)], dim=1)
    seen = model.observe(batch.topk_logprobs, batch.topk_ids, projected)  # [M, W]
    if model.memory is not None:
        seen = torch.cat((seen, _states(model.memory, seen, batch.mask)), dim=1)
    return model.decide(seen, batch.topk_logprobs)


def _states(memory: torch.nn.GRUCell, seen: Tensor, mask: Tensor) -> Tensor:
    """The recurrent state [M, S] at every token."""
    padded = seen.new_zeros(*mask.shape, seen.size(1))
    padded[mask] = seen
    state = seen.new_zeros(len(mask), memory.hidden_size)
    along = []
    for now in padded.unbind(dim=1):
        state = memory(now, state)
        along.append(state)
    return torch.stack(along, dim=1)[mask]


@dataclass(frozen=True, slots=True)
class Law:
    """What gives the tokens of a batch log-probabilities, for any coefficients."""

    mask: Tensor
    """bool [B, T], where the batch's M tokens are."""
    union: Candidates
    """What the experts show at each of them."""
    space: str
    """What the coefficients weigh."""
    temperature: float = 1.0
    """At which tokens are sampled."""
    calibration: Calibration | None = None
    """What makes it the law that sampled the tokens."""

    def token_logprobs(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of every token by coefficients [M, E] ([B, T], mask [B, T]). Tokens that the fusion finds
        impossible are masked out, and 0."""
        fused = fuse(coefficients, self.union, self.space, self.temperature, self.calibration)
        found = fused.gather(1, self.union.token_slot.unsqueeze(1)).squeeze(1)
        counts = ~found.isneginf()
        found = found.masked_fill(~counts, 0.0)
        logprobs = found.new_zeros(self.mask.shape).masked_scatter(self.mask, found)
        return logprobs, torch.zeros_like(self.mask).masked_scatter(self.mask, counts)


def law_of(batch: Batch, space: str) -> Law:
    """The fused distribution itself."""
    return Law(batch.mask, _candidates(batch), space)


def served_law(batch: Batch, served: Served, space: str, temperature: float) -> Law:
    """The law that sampled a batch: at the coefficients of then, log-probabilities are those of then."""
    union = _candidates(batch)
    calibration = calibrate(served.coefficients, union, space, temperature, served.log_normaliser)
    return Law(batch.mask, union, space, temperature, calibration)


def _candidates(batch: Batch) -> Candidates:
    lists = (batch.topk_logprobs, batch.topk_ids, batch.rest)
    return candidates(*lists, batch.tokens, batch.token_logprobs, batch.vocabulary_size)


def token_logprobs(model: GateModel, space: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every token of a batch under a gate's fusion ([B, T], mask [B, T]); see `Law`."""
    return law_of(batch, space).token_logprobs(gate_coefficients(model, batch))


def broadcast_loss(logprobs: Tensor, mask: Tensor, rewards: Tensor, negative_weight: float) -> Tensor:
    """DLLG's objective: the response's label [B] is the label of each of its tokens, binary cross-entropy.

    Raises the fused probability of tokens in right responses and lowers it in wrong ones, the latter times
    `negative_weight`, since most tokens of a wrong response are not what made it wrong. The paper's exact
    loss is not public (arXiv 2606.04378, abstract).
    """
    right = rewards.unsqueeze(1)
    unlikelihood = torch.log1p(-logprobs.exp().clamp_max(1 - 1e-4))
    values = right * logprobs.clamp_min(-20.0) + negative_weight * (1 - right) * unlikelihood
    return -(values * mask).sum() / mask.sum().clamp_min(1)


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """Rewards [P * group] in groups of one prompt's samples, normalised inside each group."""
    grouped = rewards.reshape(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4)).reshape(-1)


def clipped_policy_loss(logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Group-relative policy gradient with the clipped ratio (GRPO, arXiv 2402.03300, equation 3 without KL).

    logprobs, old, mask: [B, T]; advantages: [B].
    """
    ratio = (logprobs - old).clamp(-5.0, 5.0).exp()
    gain = torch.minimum(ratio * advantages.unsqueeze(1), ratio.clamp(1 - clip, 1 + clip) * advantages.unsqueeze(1))
    return -(gain * mask).sum() / mask.sum().clamp_min(1)


def divergence(logprobs: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Nats a token from the policy to the one it started from, by the estimator of GRPO's equation 4 (never negative).

    logprobs, start, mask: [B, T], of tokens that the policy sampled.
    """
    ratio = (start - logprobs).clamp(-5.0, 5.0)
    return ((ratio.exp() - ratio - 1) * mask).sum() / mask.sum().clamp_min(1)
