"""A gate checkpoint with random weights that reads everything a gate can read and remembers what it read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gate.checkpoint import save
from gate.contract import FORMAT_VERSION, Contract, vocabulary_hash

HIDDEN = 128
PROJECTED = 6
STATE = 8
VOCABULARY = 264


class RandomGate(nn.Module):
    """Statistics of every expert's list, a digest of its ids, its projected hidden state -> GRU -> softmax.

    The digest (the mean embedding of the listed ids under their probabilities) is smooth and does not depend on the
    order of equal candidates, so that two correct implementations agree to rounding.
    """

    def __init__(self, experts: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(hidden, PROJECTED) for _ in range(experts)])
        self.digest = nn.Embedding(vocabulary, 3)
        self.memory = nn.GRUCell(experts * (3 + 3 + PROJECTED), STATE)
        self.head = nn.Linear(STATE, experts)
        self.size = PROJECTED
        self.scale = 6.0

    @torch.jit.export
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        projected = hidden[:, : self.size]
        for index, layer in enumerate(self.projections):
            if index == expert:
                projected = torch.tanh(layer(hidden))
        return projected

    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        probabilities = topk_logprobs.exp()  # [B, E, K]
        finite = topk_logprobs.clamp(min=-50.0)
        entropy = -(probabilities * finite).sum(-1)
        statistics = torch.stack([finite[:, :, 0], finite[:, :, 0] - finite[:, :, 1], entropy], -1)  # [B, E, 3]
        digest = (self.digest(topk_ids.clamp(min=0)) * probabilities.unsqueeze(-1)).sum(2)  # [B, E, 3]
        state = self.memory(torch.cat([0.2 * statistics, digest, projected], -1).flatten(1), state)
        return (self.scale * self.head(state)).softmax(-1), state


def build(
    path: Path,
    *,
    experts: list[str],
    tokenizer: Path,
    top_k: int,
    seed: int = 0,
    hidden: int = HIDDEN,
    vocabulary: int = VOCABULARY,
) -> Path:
    """Write a gate for `experts` over the vocabulary in `tokenizer` (a tokenizer.json) to `path`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = RandomGate(len(experts), hidden, vocabulary)
    contract = Contract(
        format_version=FORMAT_VERSION,
        experts=experts,
        vocabulary_hash=vocabulary_hash(tokenizer),
        top_k=top_k,
        space="logprob",
        inputs=["topk", "hidden"],
        hidden_sizes=[hidden] * len(experts),
        projected_size=PROJECTED,
        state_size=STATE,
    )
    save(module, contract, path)
    return path
