"""vLLM's two logits-processor interfaces as one rendezvous: the engine's sampler stops here until its tokens are known.

Both classes only keep books (which row is which sequence, at which position) and leave the rest to `Rendezvous`.
They are loaded by vLLM by name, in the engine's process; `server.expert.vllm_engine` then finds them in the model
runner and calls `attach`. Until then, and while detached, the engine samples by itself.

V1: `vllm.v1.sample.logits_processor` (the CPU build and older GPU runners).
V2: `vllm.v1.worker.gpu.sample.logits_processor` (Model Runner V2, the default on GPU in vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from server.expert.engine import Int32

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

SLOT = "polylogit_slot"
"""Key of `SamplingParams.extra_args` that carries a sequence's slot."""

Decide = Callable[[Int32, Int32, torch.Tensor], Int32]
"""(slots int32[R], positions int32[R], logits [R, V]) -> token int32[R]; called once a step with every logits row."""


class Rendezvous:
    """What both interfaces share: hand all rows to `decide`, then leave one finite entry in each."""

    _decide: Decide | None = None

    def attach(self, decide: Decide) -> None:
        """From now on tokens come from `decide`."""
        self._decide = decide

    def detach(self) -> None:
        """From now on the engine samples by itself."""
        self._decide = None

    def _force(self, slots: Int32, positions: Int32, logits: torch.Tensor) -> torch.Tensor:
        if self._decide is None:
            return logits
        tokens = torch.from_numpy(self._decide(slots, positions, logits).astype(np.int64))
        logits.fill_(float("-inf"))
        return logits.scatter_(1, tokens.to(logits.device)[:, None], 0.0)


class V1Rendezvous(Rendezvous, V1LogitsProcessor):
    """Rows are the persistent batch's indices, kept up to date by `update_state`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        # Batch index -> (slot, prompt length, the request's running output tokens, a live reference).
        self._rows: dict[int, tuple[int, int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        rows = self._rows
        for index in batch_update.removed:
            rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            rows[index] = (_slot(params), len(prompt or ()), output)
        for source, target, direction in batch_update.moved:
            moved, displaced = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if direction is MoveDirectionality.SWAP and displaced is not None:
                rows[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = [self._rows[index] for index in range(logits.shape[0])]
        slots = np.array([slot for slot, _, _ in rows], np.int32)
        positions = np.array([prompt + len(output) for _, prompt, output in rows], np.int32)
        return self._force(slots, positions, logits)


class V2Rendezvous(Rendezvous, V2LogitsProcessor):
    """Rows are named by `LogitsContext`; per-request state is keyed by the runner's request index."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._slots = np.full(req_states.max_num_reqs, -1, np.int32)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._slots[req_idx] = _slot(sampling_params)
        return True

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        # Without speculative decoding there is one row a request and the host-side upper bound is exact. The bounds are
        # padded with zeros to the CUDA graph's size, whatever the interface says of their length.
        slots = self._slots[ctx.idx_mapping_np]
        return self._force(slots, ctx.seq_lens_upper_bound_np[: len(slots)].astype(np.int32), logits)


def _slot(params: SamplingParams) -> int:
    return int((params.extra_args or {}).get(SLOT, -1))
