"""Sequences to submit: random prompts, of another length for each expert."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from server.policy import Policy, Uniform
from server.request import SamplingParams, SequenceRequest
from tests.support.fake_engine import VOCABULARY

_NUMBERS = itertools.count(1)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def request(
    rng: np.random.Generator,
    lengths: tuple[int, ...] = (9, 14),
    policy: Policy | None = None,
    max_tokens: int = 12,
    **fields: Any,
) -> SequenceRequest:
    """A sequence sampled with a seed of its own; `lengths`: of each expert's prompt."""
    number = next(_NUMBERS)
    parameters = {name: fields.pop(name) for name in (*SAMPLING, "logit_bias") if name in fields}
    return SequenceRequest(
        number,
        [rng.integers(VOCABULARY, size=length).tolist() for length in lengths],
        policy or Uniform(),
        SamplingParams(seed=fields.pop("seed", 1000 + number), **parameters),
        max_tokens=max_tokens,
        **fields,
    )
