"""The gate as the coordinator sees it: arrays in, coefficients and next state out, and what happens when it misbehaves.

Letters: B rows, E experts, K top-k, d projected size, S state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gate.checkpoint import Checkpoint, load
from gate.contract import CheckpointError, require_fit
from server.coordinator.arrays import Bool, Float32, Int32
from server.errors import StartError
from server.policy import Space


@dataclass(frozen=True, slots=True)
class GateOutput:
    """A gate's answer for B rows."""

    coefficients: Float32
    """[B, E]: uniform where it failed."""

    state: Float32
    """[B, S]: the next state, the old one where it failed."""

    failed: Bool
    """[B]: rows for which it gave no usable answer."""


class GateRunner:
    """A checkpoint that fits the deployment."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def space(self) -> Space:
        return self._checkpoint.contract.space

    @property
    def top_k(self) -> int:
        """K: it reads so many of each list, from the best on."""
        return self._checkpoint.contract.top_k

    @property
    def projected_size(self) -> int:
        return self._checkpoint.contract.projected_size

    @property
    def state_size(self) -> int:
        return self._checkpoint.contract.state_size

    def __call__(self, logprobs: Float32, ids: Int32, projected: Float32, state: Float32) -> GateOutput:
        """Coefficients for rows `logprobs`, `ids` [B, E, K], `projected` [B, E, d], `state` [B, S]."""
        try:
            tensors = (
                torch.from_numpy(logprobs),
                torch.from_numpy(ids.astype(np.int64)),
                torch.from_numpy(projected),
                torch.from_numpy(state),
            )
            given, following = (tensor.numpy() for tensor in self._checkpoint.forward(*tensors))
        except (RuntimeError, ValueError, TypeError):
            return _nothing(ids.shape[:2], state)
        if given.shape != ids.shape[:2] or following.shape != state.shape:
            return _nothing(ids.shape[:2], state)
        failed = ~(np.isfinite(given).all(axis=1) & np.isfinite(following).all(axis=1) & (given != 0).any(axis=1))
        if self.space == "prob":
            failed |= (given < 0).any(axis=1)
        if not failed.any():
            return GateOutput(given, following, failed)
        fallback = _nothing(ids.shape[:2], state)
        return GateOutput(
            np.where(failed[:, None], fallback.coefficients, given),
            np.where(failed[:, None], state, following),
            failed,
        )


def load_gate(
    path: Path,
    *,
    sha256: str | None,
    experts: list[str],
    vocabulary_hash: str,
    vocabulary_size: int,
    hidden_sizes: list[int],
) -> GateRunner:
    """Load the checkpoint at `path` for a deployment. Raises StartError naming each field that does not fit."""
    try:
        checkpoint = load(path, sha256=sha256)
        require_fit(
            checkpoint.contract,
            path,
            experts=experts,
            vocabulary_hash=vocabulary_hash,
            vocabulary_size=vocabulary_size,
            hidden_sizes=hidden_sizes,
        )
    except CheckpointError as error:
        raise StartError(f"gate: {error}") from None
    return GateRunner(checkpoint)


def _nothing(shape: tuple[int, ...], state: Float32) -> GateOutput:
    rows, experts = shape
    return GateOutput(np.full((rows, experts), 1 / experts, np.float32), state, np.ones(rows, bool))
