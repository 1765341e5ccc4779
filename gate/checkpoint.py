"""Gate checkpoints: one TorchScript file with its contract embedded. The only file that calls torch.jit.

TorchScript is deprecated in torch, so its three deprecation messages are silenced here and nowhere else;
replacing it by torch.export means rewriting this file alone. A TorchScript file is code: load only files
that you trust. Knows nothing of what the gate computes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gate.contract import CONTRACT_ENTRY, CheckpointError, Contract, encode_contract, read_contract, require_sha256

_DEPRECATED = r"`torch\.jit\.(script|save|load|script_method|freeze|export)`"


class Checkpoint:
    """A loaded checkpoint, in eval mode. B rows, E experts, K listed candidates, d projected, S state."""

    def __init__(self, module: Any, contract: Contract, device: str) -> None:
        self.contract = contract
        self.device = device
        self._module = module

    @property
    def module(self) -> Any:
        """The scripted module."""
        return self._module

    @torch.inference_mode()
    def project(self, expert: int, hidden: Tensor) -> Tensor:
        """Hidden states [B, H_i] of one expert to [B, d]: the only part of them that travels."""
        with _unprofiled():
            projected: Tensor = self._module.project(expert, hidden)
        return projected

    @torch.inference_mode()
    def forward(
        self, topk_logprobs: Tensor, topk_ids: Tensor, projected: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([B, E, K], int64 [B, E, K], [B, E, d], [B, S]) -> (coefficients [B, E], next state [B, S]).

        An absent candidate, or every candidate of an absent expert, is log-probability -inf with id -1.
        """
        with _unprofiled():
            coefficients, state = self._module(topk_logprobs, topk_ids, projected, state)
        return coefficients, state


def save(module: nn.Module, contract: Contract, path: Path) -> None:
    """Scripts `module` (with an exported method `project`) and writes it with its contract; makes the folders above."""
    extra = {CONTRACT_ENTRY: encode_contract(contract)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _deprecations_silenced():
        torch.jit.script(module.eval()).save(str(path), _extra_files=extra)  # type: ignore[no-untyped-call]


def load(path: Path, device: str = "cpu", sha256: str | None = None) -> Checkpoint:
    """Loads a checkpoint. Raises CheckpointError when missing, corrupt, without a valid contract, or not the file that
    `sha256` (hexadecimal) pins."""
    contract = read_contract(path)
    require_sha256(path, sha256)
    try:
        with _deprecations_silenced():
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a readable TorchScript archive: {error}") from error
    if not hasattr(module, "project"):
        raise CheckpointError(f"{path} has no method `project`; it is not a gate checkpoint")
    return Checkpoint(module, contract, device)


def _unprofiled() -> Any:
    """No profiling executor: it would pause to specialise again for every new batch size."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]


@contextmanager
def _deprecations_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_DEPRECATED, category=DeprecationWarning)
        yield
