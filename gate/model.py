"""The gate: a few thousand parameters that turn what the experts show into fusion coefficients.

One module covers the families: top-k statistics, projected hidden states, or both, each with or without a
recurrent state that follows the response. TorchScript-compatible. Knows nothing of files or training.
"""

import torch
from torch import Tensor, nn

from gate.contract import Contract
from gate.features import feature_count, topk_features

WIDTH = 32


class GateModel(nn.Module):
    """Coefficients = softmax of a small network, so they lie on the simplex: valid in both spaces.

    An expert whose whole list is absent (-inf) gets coefficient 0, unless all are absent.
    """

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        experts = len(contract.experts)
        self.reads_topk = "topk" in contract.inputs
        self.projected_size = contract.projected_size
        inputs = experts * contract.projected_size + (feature_count(experts) if self.reads_topk else 0)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size, elementwise_affine=False), nn.Linear(size, self.projected_size))
            for size in contract.hidden_sizes
        )
        self.trunk = nn.Linear(inputs, WIDTH)
        self.memory = nn.GRUCell(WIDTH, contract.state_size) if contract.state_size else None
        self.head = nn.Linear(WIDTH + contract.state_size, experts)

    @torch.jit.export
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        """[B, H_i] -> [B, d] for expert i; runs beside the expert, so that only d floats travel."""
        projected = torch.zeros([hidden.size(0), self.projected_size], device=hidden.device)
        for index, projection in enumerate(self.projections):
            if index == expert:
                projected = projection(hidden.float())
        return projected

    @torch.jit.export
    def observe(self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor) -> Tensor:
        """([B, E, K], int64 [B, E, K], [B, E, d]) -> [B, W]: what a token shows, before any memory."""
        inputs = projected.reshape(projected.size(0), -1)
        if self.reads_topk:
            inputs = torch.cat((topk_features(topk_logprobs, topk_ids), inputs), dim=1)
        return torch.tanh(self.trunk(inputs))

    @torch.jit.export
    def decide(self, seen: Tensor, topk_logprobs: Tensor) -> Tensor:
        """([B, W + S], [B, E, K]) -> coefficients [B, E]."""
        absent = topk_logprobs[:, :, 0].isneginf()
        coefficients: Tensor = self.head(seen).masked_fill(absent, -1e9).softmax(-1)
        return coefficients

    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([B, E, K], int64 [B, E, K], [B, E, d], [B, S]) -> (coefficients [B, E], next state [B, S])."""
        seen = self.observe(topk_logprobs, topk_ids, projected)
        if self.memory is not None:
            state = self.memory(seen, state)
            seen = torch.cat((seen, state), dim=1)
        return self.decide(seen, topk_logprobs), state
