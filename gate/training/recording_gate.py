"""The recording gate: a checkpoint that lets the experts' raw hidden states travel to the coordinator.

Its projection of a hidden state is the hidden state, padded to the widest expert's; the gate inside it, if any, is
applied to them where the coefficients are computed. So a deployment that runs with it decodes as with the gate inside,
and shows what a gate can be trained on. Knows nothing of how a deployment is run.
"""

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from gate import checkpoint
from gate.contract import FORMAT_VERSION, Contract


class UniformGate(nn.Module):
    """1/E each: what a recording gate holds while there is no gate yet."""

    @torch.jit.export
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        """[B, H_i] -> [B, 0]."""
        return hidden.new_zeros([hidden.size(0), 0])

    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, experts = topk_ids.size(0), topk_ids.size(1)
        return torch.full([rows, experts], 1.0 / experts, device=topk_logprobs.device), state


class RecordingGate(nn.Module):
    """`inner` applied to raw hidden states; H = max(H_i) floats travel for each expert."""

    def __init__(self, inner: Any, hidden_sizes: list[int]) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = list(hidden_sizes)
        self.width = max(hidden_sizes)

    @torch.jit.export
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        """[B, H_i] -> [B, H], zeros at the end."""
        return nn.functional.pad(hidden.float(), [0, self.width - hidden.size(1)])

    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([B, E, K], int64 [B, E, K], [B, E, H], [B, S]) -> (coefficients [B, E], next state [B, S])."""
        parts = []
        for expert, size in enumerate(self.sizes):
            parts.append(self.inner.project(expert, projected[:, expert, :size]))
        coefficients, state = self.inner(topk_logprobs, topk_ids, torch.stack(parts, dim=1), state)
        return coefficients, state


def uniform_gate(experts: list[str], vocabulary_hash: str, top_k: int) -> tuple[nn.Module, Contract]:
    """A gate that weighs these experts equally, and its contract."""
    contract = Contract(
        format_version=FORMAT_VERSION,
        experts=experts,
        vocabulary_hash=vocabulary_hash,
        top_k=top_k,
        space="logprob",
        inputs=["topk"],
        hidden_sizes=[],
        projected_size=0,
        state_size=0,
    )
    return UniformGate(), contract


def wrap(inner: Any, contract: Contract, hidden_sizes: list[int], path: Path) -> None:
    """Write a recording gate around a gate (a module, or a loaded checkpoint's) with this contract."""
    recording = msgspec.structs.replace(
        contract,
        inputs=["topk", "hidden"],
        hidden_sizes=hidden_sizes,
        projected_size=max(hidden_sizes),
        recording=True,
    )
    checkpoint.save(RecordingGate(inner, hidden_sizes), recording, path)
