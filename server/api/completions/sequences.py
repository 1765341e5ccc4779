"""From a validated request and its prompts to the sequences that the coordinator runs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.api.completions.ensemble import chosen_temperatures
from server.api.protocol import GenerationRequest
from server.errors import BadRequest
from server.request import SamplingParams, SequenceRequest
from server.text.deployment import Deployment, Ensemble


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    ids: Sequence[list[int]]
    """Token ids for each expert of the request's ensemble."""
    room: int
    """Tokens that every expert's context leaves for the answer."""
    scored: bool = False
    """Whether its tokens but the first get log-probabilities, before the answer's; then it is the same for each
    expert."""
    echo: str = ""
    """What of it is shown before the answer."""


class SequenceFactory:
    """Makes the sequences of one request: n for each prompt, prompt by prompt, and one for each prompt that is to be
    scored beside its answers.

    `next_number` gives unused numbers; `grammar` is what each answer must match. Raises BadRequest for what only the
    vocabulary shows to be wrong.
    """

    def __init__(
        self,
        deployment: Deployment,
        ensemble: Ensemble,
        request: GenerationRequest,
        *,
        next_number: Callable[[], int],
        grammar: str | None,
    ) -> None:
        _check_ids(request, ensemble)
        self._ensemble = ensemble
        self._request = request
        self._next_number = next_number
        self._grammar = grammar
        self._experts = len(deployment.experts)
        self._temperatures = chosen_temperatures(deployment, request.fusion)
        self._seed = secrets.randbits(64) if request.seed is None else request.seed
        self._stop_token_ids = frozenset(request.stop_token_ids)
        if not request.ignore_eos:
            self._stop_token_ids |= ensemble.eos_token_ids
        if grammar is not None:  # may end with any expert's end token
            self._stop_token_ids |= frozenset().union(*(expert.eos_token_ids for expert in deployment.experts))

    def make(self, prompts: Iterable[Prompt]) -> list[SequenceRequest]:
        return [self._sequence(prompt, choice) for prompt in prompts for choice in range(self._request.n)]

    def scoring(self, prompts: Iterable[Prompt]) -> list[SequenceRequest]:
        """For `prompt_logprobs`: every token of a prompt but the first is given, nothing is sampled."""
        return [
            SequenceRequest(
                id=self._next_number(),
                prompts=self._by_expert([ids[:1] for ids in prompt.ids]),
                policy=self._ensemble.policy,
                max_tokens=len(prompt.ids[0]) - 1,
                temperatures=self._temperatures,
                top_logprobs=self._request.prompt_logprobs,
                given=prompt.ids[0][1:],
                priority=self._request.priority,
            )
            for prompt in prompts
        ]

    def _sequence(self, prompt: Prompt, choice: int) -> SequenceRequest:
        request = self._request
        given = prompt.ids[0][1:] if prompt.scored else []
        return SequenceRequest(
            id=self._next_number(),
            prompts=self._by_expert([ids[:1] for ids in prompt.ids] if prompt.scored else prompt.ids),
            policy=self._ensemble.policy,
            sampling=self._sampling(choice),
            max_tokens=len(given) + self._max_tokens(prompt.room),
            min_tokens=len(given) + min(request.min_tokens, prompt.room),
            stop_token_ids=sorted(self._stop_token_ids),
            temperatures=self._temperatures,
            top_logprobs=request.alternatives,
            expert_weights=request.expert_weights,
            given=given,
            grammar=self._grammar,
            priority=request.priority,
        )

    def _max_tokens(self, room: int) -> int:
        limit = self._request.max_new_tokens
        return room if limit is None else min(limit, room)

    def _by_expert(self, ids: Sequence[list[int]]) -> list[list[int]]:
        prompts: list[list[int]] = [[] for _ in range(self._experts)]
        for index, own in zip(self._ensemble.indexes, ids, strict=True):
            prompts[index] = own
        return prompts

    def _sampling(self, choice: int) -> SamplingParams:
        request = self._request
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=max(request.top_k, 0),
            min_p=request.min_p,
            seed=(self._seed + choice) % 2**64,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=request.logit_bias,
        )


def _check_ids(request: GenerationRequest, ensemble: Ensemble) -> None:
    """Token ids must be of the vocabulary, and min_tokens no more than max_tokens."""
    last = ensemble.vocab_size - 1
    if request.logit_bias and max(request.logit_bias) > last:
        raise BadRequest(f"logit_bias: token ids must be integers from 0 to {last}", param="logit_bias")
    if request.stop_token_ids and max(request.stop_token_ids) > last:
        raise BadRequest(f"stop_token_ids: token ids must be integers from 0 to {last}", param="stop_token_ids")
    if request.max_new_tokens is not None and request.min_tokens > request.max_new_tokens:
        raise BadRequest("min_tokens is more than max_tokens", param="min_tokens")
