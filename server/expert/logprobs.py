"""What a worker says about its rows' logits: log-probabilities over the whole vocabulary, of the top-k and of named
ids.

Runs on the engine's device. Nothing here depends on an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Statistics:
    """One step's logits, and what makes them log-probabilities."""

    logits: torch.Tensor
    """float32[B, V], divided by the rows' temperatures."""
    log_normaliser: torch.Tensor
    """float32[B, 1]: the logits less this are log-probabilities."""

    def top_k(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64[B, K] and log-probabilities float32[B, K], best first; K = min(k, V)."""
        values, ids = torch.topk(self.logits, min(k, self.logits.shape[-1]), dim=-1)
        return ids, values - self.log_normaliser

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """float32[B, U] log-probabilities of `ids` int64[B, U]; -inf where an id is negative."""
        values = self.logits.gather(-1, ids.clamp(min=0)) - self.log_normaliser
        return values.masked_fill(ids < 0, float("-inf"))

    def entropies(self) -> torch.Tensor:
        """float32[B] in nats."""
        terms: torch.Tensor = torch.special.entr((self.logits - self.log_normaliser).exp())
        return terms.sum(-1)

    def write(self, row: int, target: torch.Tensor) -> None:
        """Write the log-probabilities of a row into `target` float32[V] of this host's memory."""
        logits, normaliser = self.logits[row], self.log_normaliser[row]
        if logits.is_cpu:
            torch.sub(logits, normaliser, out=target)
        else:
            target.copy_(logits - normaliser)

    def row(self, index: int) -> Statistics:
        """A copy of one row's, which does not keep the step's logits alive."""
        return Statistics(self.logits[index : index + 1].clone(), self.log_normaliser[index : index + 1].clone())


def statistics(logits: torch.Tensor, temperature: torch.Tensor | None = None) -> Statistics:
    """Statistics of `logits` [B, V], each row divided by its `temperature` [B, 1] if given."""
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature
    return Statistics(logits, logits.logsumexp(-1, keepdim=True))
