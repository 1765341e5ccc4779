"""What a worker says about its rows' logits: log-probabilities over the whole vocabulary, of the top-k and of named
ids.

Runs on the engine's device. Nothing here depends on an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Statistics:
    """One step's logits, and what makes them log-probabilities: less the largest, less the log of what is left. In two
    numbers, since one as large as logits can be would be rounded, and with it the mass of all tokens."""

    logits: torch.Tensor
    """float32[B, V], divided by the rows' temperatures."""
    largest: torch.Tensor
    """float32[B, 1]: the largest of them."""
    log_sum: torch.Tensor
    """float32[B, 1]: log of the sum of exp(logit - largest)."""

    def top_k(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64[B, K] and log-probabilities float32[B, K], best first; K = min(k, V)."""
        values, ids = torch.topk(self.logits, min(k, self.logits.shape[-1]), dim=-1)
        return ids, self._logprobs(values)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """float32[B, U] log-probabilities of `ids` int64[B, U]; -inf where an id is negative."""
        values = self._logprobs(self.logits.gather(-1, ids.clamp(min=0)))
        return values.masked_fill(ids < 0, float("-inf"))

    def entropies(self) -> torch.Tensor:
        """float32[B] in nats."""
        terms: torch.Tensor = torch.special.entr(self._logprobs(self.logits).exp())
        return terms.sum(-1)

    def write(self, row: int, target: torch.Tensor) -> None:
        """Write the log-probabilities of a row into `target` float32[V] of this host's memory."""
        logits, largest, log_sum = self.logits[row], self.largest[row], self.log_sum[row]
        if logits.is_cpu:
            torch.sub(logits, largest, out=target).sub_(log_sum)
        else:
            target.copy_((logits - largest).sub_(log_sum))

    def row(self, index: int) -> Statistics:
        """A copy of one row's, which does not keep the step's logits alive."""
        one = slice(index, index + 1)
        return Statistics(self.logits[one].clone(), self.largest[one].clone(), self.log_sum[one].clone())

    def _logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Of some logits [B, U]."""
        return (logits - self.largest).sub_(self.log_sum)


def statistics(logits: torch.Tensor, temperature: torch.Tensor | None = None) -> Statistics:
    """Statistics of `logits` [B, V], each row divided by its `temperature` [B, 1] if given."""
    logits = logits.float()
    if temperature is not None:
        logits = logits / temperature
    largest = logits.amax(-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    return Statistics(logits, largest, (logits - largest).exp_().sum(-1, keepdim=True).log_())
