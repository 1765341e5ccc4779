"""The laws that tokens should follow, in float64 over the whole vocabulary; and what fusing lists of 32 alone gave.

Imports nothing that serves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tests.bench.exactness.cases import Case
from tests.bench.exactness.recording import Recording
from tests.support.oracle.huggingface import Decision, Views

BEFORE_K = 32

Float64 = npt.NDArray[np.float64]


def decided(recording: Recording, case: Case, position: int) -> Decision:
    """The fused law at one position, `logprobs` float64[1, V]."""
    logprobs = torch.from_numpy(recording.logprobs[position].astype(np.float64)).log_softmax(-1)
    return case(position).rule(Views(logprobs[None], []))


def heated(logprobs: Float64, temperature: float) -> Float64:
    """float64[V]: the law at a temperature, from that at 1."""
    return np.asarray(torch.from_numpy(logprobs / temperature).log_softmax(-1).numpy())


def listed(recording: Recording, position: int, k: int) -> npt.NDArray[np.int64]:
    """int64[U]: the tokens that at least one expert has among its `k` most probable."""
    rows = recording.logprobs[position]
    return np.unique(np.argpartition(-rows, k - 1, axis=-1)[:, :k])


def missing_nats(law: Float64, tokens: npt.NDArray[np.int64]) -> float:
    """By how much log-probabilities are too high that are normalised over `tokens` alone, whatever the token."""
    return -float(np.logaddexp.reduce(law[tokens]))
