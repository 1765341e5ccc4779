"""The gate applied to recorded responses, and the two response-level objectives. Experts stay frozen.

Neither objective sees a token label: only the correctness of a whole response. Knows nothing of files, of
models' weights or of how responses were made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gate.dataset import Records
from gate.fuse import Candidates, candidates, fuse, token_slots
from gate.model import GateModel


@dataclass(frozen=True, slots=True)
class Prepared:
    """Records with the union of the experts' lists worked out once. N tokens, E experts, U union slots."""

    records: Records
    union: Candidates
    slots: Tensor  # int64 [N], the response token's slot in the union
    listed: Tensor  # bool [N], False where no expert lists the token: such tokens are not trained on


def prepare(records: Records) -> Prepared:
    """Works out the unions in chunks, to bound memory."""
    rows = torch.arange(len(records.tokens)).tensor_split(1 + len(records.tokens) // 8192)
    chunks = [
        candidates(records.topk_logprobs[chunk], records.topk_ids[chunk], records.vocabulary_size) for chunk in rows
    ]
    union = Candidates(torch.cat([chunk.ids for chunk in chunks]), torch.cat([chunk.logprobs for chunk in chunks]))
    slots, listed = token_slots(union, records.tokens)
    return Prepared(records, union, slots, listed)


def gate_coefficients(model: GateModel, state_size: int, records: Records, index: Tensor) -> Tensor:
    """Coefficients [B, T, E] along responses given by token rows `index` [B, T]; state starts at zero."""
    rows, steps = index.shape
    flat = index.reshape(-1)
    hidden = [states[flat] for states in records.hidden]
    projected = torch.stack([model.project(i, states) for i, states in enumerate(hidden)], dim=1)
    logprobs, ids = records.topk_logprobs[flat], records.topk_ids[flat]
    if state_size == 0:
        coefficients: Tensor = model(logprobs, ids, projected, projected.new_zeros(len(flat), 0))[0]
        return coefficients.reshape(rows, steps, len(hidden))
    state = projected.new_zeros(rows, state_size)
    along = []
    for step in range(steps):
        now = torch.arange(rows) * steps + step
        coefficients, state = model(logprobs[now], ids[now], projected[now], state)
        along.append(coefficients)
    return torch.stack(along, dim=1)


def token_logprobs(
    model: GateModel, state_size: int, space: str, prepared: Prepared, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Fused log-probability of every token of the chosen responses [B]: ([B, T], mask [B, T])."""
    index, mask = prepared.records.padded_index(chosen)
    coefficients = gate_coefficients(model, state_size, prepared.records, index)
    flat = index.reshape(-1)
    union = Candidates(prepared.union.ids[flat], prepared.union.logprobs[flat])
    fused = fuse(coefficients.reshape(len(flat), -1), union, space)
    slots = prepared.slots[flat].unsqueeze(1)
    return fused.gather(1, slots).reshape(index.shape), mask & prepared.listed[index]


def broadcast_loss(logprobs: Tensor, mask: Tensor, rewards: Tensor, negative_weight: float) -> Tensor:
    """DLLG's objective: the response's label [B] is the label of each of its tokens, binary cross-entropy.

    Raises the fused probability of tokens in right responses and lowers it in wrong ones, the latter times
    `negative_weight`, since most tokens of a wrong response are not what made it wrong. The paper's exact
    loss is not public (arXiv 2606.04378, abstract).
    """
    right = rewards.unsqueeze(1)
    unlikelihood = torch.log1p(-logprobs.exp().clamp_max(1 - 1e-4))
    values = right * logprobs.clamp_min(-20.0) + negative_weight * (1 - right) * unlikelihood
    return -(values * mask).sum() / mask.sum()


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
