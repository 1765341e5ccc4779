"""The domain's vocabulary: what a client asked for, in token ids, and how an answer can end.

Imports nothing of the project but the policies. Nothing here knows text, HTTP, engines or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from server.policy import Policy


class FinishReason(StrEnum):
    """How a sequence ended; `stop` and `length` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


MOST_PRIORITY = 1 << 20
"""Bound on a request's priority, either way."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is drawn from the fused distribution, in OpenAI's and vLLM's meaning.

    `temperature` 0 is greedy. `top_k` 0 is off. `seed` is the 64-bit seed of this very sequence: its token at
    position t depends on (seed, t) and the fused distribution alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate. A client's request with n choices makes n of these.

    `prompts` has one list of token ids per expert of the deployment, in its order; an empty list for an expert that the
    policy does not use. `temperatures` scales each expert's own logits before fusion (None: 1 for all). Generation ends
    at a token of `stop_token_ids` (at the earliest after `min_tokens`) or at `max_tokens`. `top_logprobs`: None for no
    log-probabilities, else how many alternatives to return with each token. `given`: tokens that follow the prompts and
    are not drawn, but fused like drawn ones; they count in `max_tokens`. What is drawn after them is what would follow
    the same tokens as part of the prompts. `grammar`: what the generated text must match, in llguidance's own text
    form; its end is marked by an end token of any expert of the deployment. `record`: every expert runs, whether or not
    the policy uses it, so `prompts` has one for each; what it shows comes back as `Recorded` messages. `timed`: its
    first token comes with a `Timing`. `priority`: lower runs earlier, within +-MOST_PRIORITY; ties in order of arrival.
    """

    id: int
    prompts: list[list[int]]
    policy: Policy
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    temperatures: list[float] | None = None
    top_logprobs: int | None = None
    expert_weights: bool = False
    given: list[int] = field(default_factory=list)
    grammar: str | None = None
    record: bool = False
    timed: bool = False
    priority: int = 0
