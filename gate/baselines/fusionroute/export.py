"""The routing head as a gate checkpoint that any deployment runs: the chosen expert 1, the router 1, others 0."""

from pathlib import Path

import torch
from torch import Tensor, nn

from gate import checkpoint
from gate.contract import FORMAT_VERSION, Contract, vocabulary_hash


class RouteGate(nn.Module):
    """Reads only the hidden state of the router, the last of the deployment's experts. E experts without it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.experts = head.out_features

    @torch.jit.export
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        """[B, H] -> scores [B, E] beside the router; zeros beside the others."""
        if expert == self.experts:
            scores: Tensor = self.head(hidden.float())
            return scores
        return torch.zeros([hidden.size(0), self.experts], device=hidden.device)

    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Coefficients [B, E + 1]: one-hot over the experts that are there, then 1."""
        absent = topk_logprobs[:, : self.experts, 0].isneginf()
        chosen = projected[:, self.experts].masked_fill(absent, -1e30).argmax(-1)
        coefficients = torch.zeros([chosen.size(0), self.experts + 1], device=projected.device)
        coefficients.scatter_(1, chosen.unsqueeze(1), 1.0)
        coefficients[:, self.experts] = 1.0
        return coefficients, state


def export(
    head: nn.Linear, experts: list[str], router: str, hidden_sizes: list[int], tokenizer: Path, path: Path
) -> None:
    """Writes the checkpoint for a deployment of `experts` and then `router`; `hidden_sizes` in the same order."""
    contract = Contract(
        format_version=FORMAT_VERSION,
        experts=[*experts, router],
        vocabulary_hash=vocabulary_hash(tokenizer),
        top_k=1,  # whether there is a list at all
        space="logprob",
        inputs=["hidden"],
        hidden_sizes=hidden_sizes,
        projected_size=len(experts),
        state_size=0,
    )
    checkpoint.save(RouteGate(head.cpu()), contract, path)
