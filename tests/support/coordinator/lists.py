"""What experts say of made-up distributions: lists cut short, and the values of single ids."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from server.coordinator.fusion import tabulate

ROWS, EXPERTS, VOCABULARY = 12, 3, 40
NO_EXACT = np.full((ROWS, 1), -1, np.int32), np.full((ROWS, EXPERTS, 1), -np.inf, np.float32)
"""No exact ids: (ids, log-probabilities)."""


def distributions(seed: int, scale: float = 2.0) -> np.ndarray:
    """float64[B, E, V] log-probabilities."""
    return log_softmax(scale * np.random.default_rng(seed).normal(size=(ROWS, EXPERTS, VOCABULARY)), axis=-1)


def top(logprobs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int32[B, E, K] and float32 log-probabilities, best first: what the experts' reports hold."""
    ids = np.argsort(-logprobs, axis=-1)[..., :k]
    return ids.astype(np.int32), np.take_along_axis(logprobs, ids, -1).astype(np.float32)


def exact_ids(seed: int, width: int) -> np.ndarray:
    """int32[B, X]: 0 to X distinct ids a row, then -1."""
    rng = np.random.default_rng(seed)
    ids = np.full((ROWS, width), -1, np.int32)
    for row in ids:
        count = rng.integers(width + 1)
        row[:count] = rng.choice(VOCABULARY, count, replace=False)
    return ids


def exact_values(logprobs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float32[B, E, X], -inf past a row's own ids."""
    values = np.take_along_axis(logprobs, np.maximum(ids, 0)[:, None, :].repeat(EXPERTS, 1), -1)
    return np.where(ids[:, None, :] >= 0, values, -np.inf).astype(np.float32)


def truncated(seed: int, k: int, width: int):
    """(full distributions, ids, logprobs, exact ids, exact logprobs, table)."""
    full = distributions(seed)
    ids, logprobs = top(full, k)
    exact = exact_ids(seed + 100, width)
    values = exact_values(full, exact)
    return full, ids, logprobs, exact, values, tabulate(ids, logprobs, exact, values, VOCABULARY)
