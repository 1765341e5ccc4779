"""A gate with one of its inputs removed, to see what it relies on: `python -m gate.baselines.ablate`.

The input is replaced by a constant where the gate is used; nothing is trained again. A removed list is flat, over the
same ids for every expert; a removed hidden state is zero; removed state is a first token's. E experts, K listed ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from gate import checkpoint
from gate.options import OptionsError, Output, run_module

Input = Literal["topk", "hidden", "state"]


class Without(nn.Module):
    """The gate `inner` without one of its inputs."""

    def __init__(self, inner: Any, removed: Input) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateOptions:
    """Of `python -m gate.baselines.ablate`."""

    gate: Path
    """A checkpoint."""
    remove: Input
    """The input that is taken from it."""
    output: Annotated[Path, Output()]
    """The checkpoint without it."""


def ablate(options: AblateOptions) -> None:
    """Run the command. Raises GateError, OptionsError."""
    gate = checkpoint.load(options.gate)
    has = {*gate.contract.inputs, *(["state"] if gate.contract.state_size else [])}
    if options.remove not in has:
        raise OptionsError(f"{options.gate} does not read {options.remove}")
    checkpoint.save(Without(gate.module, options.remove), gate.contract, options.output)


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m gate.baselines.ablate", __doc__, AblateOptions, ablate, arguments)


if __name__ == "__main__":
    main()
