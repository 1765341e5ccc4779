"""The engine protocol: what a worker needs of an inference engine, and the rows that an engine shows in each step.

`server.expert.vllm_engine` implements it with vLLM; the tests ship a deterministic fake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from server.wire.expert import Add, Load, Ready

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rows:
    """What an engine shows at its sampling point: one row for each sequence whose next token is due."""

    slots: Int32
    """int32[B]: the sequences, by their slots."""
    positions: Int32
    """int32[B]: the token to choose will be the sequence's p-th, counted from 0 and with the prompt."""
    logits: torch.Tensor
    """[B, V], any float type, on the engine's device, after grammar masks."""
    hidden: torch.Tensor | None
    """[B, H]: the last hidden state, what enters the LM head; None where the engine was not asked for it."""


Exchange = Callable[[Rows], Int32]
"""Shows rows, blocks until the tokens int32[B] for them are known."""


class Engine(Protocol):
    """One expert's engine. Not thread-safe; everything but `step` happens between steps."""

    info: Ready
    """What it is, once it is loaded."""

    def add(self, add: Add) -> None:
        """Start a sequence; it takes part from the next step on."""

    def drop(self, slots: Sequence[int]) -> None:
        """Forget sequences; what they wrote to the KV cache may stay for later reuse. Unknown slots are ignored."""

    def busy(self) -> bool:
        """Whether any sequence is in the engine."""

    def step(self, exchange: Exchange) -> None:
        """Run one step. Calls `exchange` exactly once, with no rows if no sequence's token is due."""

    def load(self) -> Load:
        """How busy it is."""

    def scores(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        """(sequence, log-probability of each prompt token but the first) for prompts scored since the last call."""

    def refused(self) -> list[tuple[int, str]]:
        """(sequence, why) for those whose grammar the engine cannot follow, since the last call. They show no rows."""

    def cached_tokens(self) -> dict[int, int]:
        """Sequence -> prompt tokens found in the prefix cache, for prefills finished since the last call."""

    def bare_steps(self, sequences: int, prompt_tokens: int, tokens: int) -> list[float]:
        """Benchmark: greedy decoding of made-up prompts without rendezvous; seconds of each decoding step."""

    def close(self) -> None:
        """Give up its memory and devices."""
