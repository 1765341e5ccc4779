"""A gate with one of its inputs removed, to see what it relies on: `python -m gate.baselines.ablate`.

The input is replaced by a constant where the gate is used; nothing is trained again. A removed list is flat, over the
same ids for every expert; a removed hidden state is zero; removed state is a first token's. E experts, K listed ids.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gate import checkpoint
from gate.errors import one_line

INPUTS = ("topk", "hidden", "state")


class Without(nn.Module):
    """The gate `inner` without one of `INPUTS`."""

    def __init__(self, inner: Any, removed: str) -> None:
        super().__init__()
        self.inner = inner
        self.topk = removed == "topk"
        self.hidden = removed == "hidden"
        self.state = removed == "state"

    @torch.jit.export
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        """[B, H_i] -> [B, d]."""
        projected: Tensor = self.inner.project(expert, torch.zeros_like(hidden) if self.hidden else hidden)
        return projected

    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([B, E, K], int64 [B, E, K], [B, E, d], [B, S]) -> (coefficients [B, E], next state [B, S])."""
        if self.topk:
            listed = topk_ids.size(2)
            flat = torch.zeros_like(topk_logprobs) - torch.log(torch.tensor(2.0 * listed))  # half of the mass is listed
            topk_logprobs = torch.where(topk_logprobs.isneginf(), topk_logprobs, flat)
            topk_ids = torch.arange(listed, device=topk_ids.device).expand_as(topk_ids)
        if self.state:
            state = torch.zeros_like(state)
        coefficients, state = self.inner(topk_logprobs, topk_ids, projected, state)
        return coefficients, state


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m gate.baselines.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gate", type=Path, required=True)
    parser.add_argument("--remove", choices=INPUTS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with one_line(parser):
        gate = checkpoint.load(arguments.gate)
        has = {*gate.contract.inputs, *(["state"] if gate.contract.state_size else [])}
        if arguments.remove not in has:
            parser.error(f"{arguments.gate} does not read {arguments.remove}")
        checkpoint.save(Without(gate.module, arguments.remove), gate.contract, arguments.output)


if __name__ == "__main__":
    main()
