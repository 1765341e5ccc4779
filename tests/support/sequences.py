"""Sequences to submit, and the numbers that no two of them share."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from server.policy import Policy
from server.request import SamplingParams, SequenceRequest

_NUMBERS = itertools.count()


def greedy(prompts: list[list[int]], policy: Policy, max_tokens: int, **fields: Any) -> SequenceRequest:
    """A sequence without stop tokens, decoded greedily."""
    return SequenceRequest(
        next(_NUMBERS), prompts, policy, SamplingParams(temperature=0.0), max_tokens=max_tokens, **fields
    )


def sampled(prompts: list[list[int]], policy: Policy, max_tokens: int, *, seed: int, **fields: Any) -> SequenceRequest:
    """A sequence without stop tokens, drawn at temperature 1 unless `temperature` says otherwise."""
    params = SamplingParams(temperature=fields.pop("temperature", 1.0), top_p=fields.pop("top_p", 1.0), seed=seed)
    return SequenceRequest(next(_NUMBERS), prompts, policy, params, max_tokens=max_tokens, **fields)


def again(request: SequenceRequest, **changes: Any) -> SequenceRequest:
    """The same sequence under a new number."""
    return replace(request, id=next(_NUMBERS), **changes)
