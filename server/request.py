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


MAX_PRIORITY = 1 << 20
"""Bound on a request's priority, either way."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is sampled from the fused distribution, in OpenAI's and vLLM's meaning."""

    temperature: float = 1.0
    """Divides the fused log-probabilities; 0 is greedy."""
    top_p: float = 1.0
    """Keep the most probable tokens that together have this probability; 1 keeps all."""
    top_k: int = 0
    """How many of the most probable tokens are kept; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 drops none."""
    seed: int = 0
    """64-bit, of this very sequence: its token at position t depends on (seed, t) and the fused distribution alone."""
    presence_penalty: float = 0.0
    """Subtracted once from the score of every token that was generated already."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's score for each time that it was generated already."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scores of tokens of the prompt and the answer; 1 is off."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id -> what is added to its score."""


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to generate. A client's request with n choices makes n of these."""

    id: int
    """Unique among the sequences of the api process."""
    prompts: list[list[int]]
    """Token ids for each expert of the deployment, in its order; empty for an expert that the policy does not use."""
    policy: Policy
    """How the experts are fused."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How each token is sampled."""
    max_tokens: int = 16
    """Generation ends after so many tokens, those of `given` included."""
    min_tokens: int = 0
    """The earliest length at which a token of `stop_token_ids` may end it."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end it."""
    temperatures: list[float] | None = None
    """For each expert, what its own logits are divided by before fusion; None: 1 for all."""
    top_logprobs: int | None = None
    """How many alternatives come with each token; None for no log-probabilities."""
    expert_weights: bool = False
    """Whether each token comes with the experts' coefficients."""
    given: list[int] = field(default_factory=list)
    """Tokens that follow the prompts and are not sampled, but fused like sampled ones. What comes after them is what
    would follow the same tokens as part of the prompts."""
    grammar: str | None = None
    """What the generated text must match, in llguidance's own text form; its end is marked by an end token of any
    expert of the deployment."""
    record: bool = False
    """Every expert runs, whether or not the policy uses it, so `prompts` has one for each; what it shows comes back as
    `Recorded` messages."""
    timed: bool = False
    """Its first token comes with a `Timing`."""
    priority: int = 0
    """Lower runs earlier, within +-MAX_PRIORITY; ties in order of arrival."""
