"""What one accepted request will do: the sequences that it runs, and who reads their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.completions.choices import ChoiceStream, PromptScores
from server.api.completions.encoder import ResponseEncoder
from server.api.completions.sequences import Prompt, SequenceFactory
from server.api.protocol import GenerationRequest
from server.api.summary import Usage
from server.config import Limits
from server.errors import BadRequest
from server.request import SequenceRequest
from server.text.deployment import Ensemble

_MAX_SEQUENCES = 1024
"""Of one request."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a response is made from."""

    request: GenerationRequest
    """What the client asked for."""
    model: str
    """The model name, as it is answered."""
    sequences: list[SequenceRequest]
    """One for each of `choices`, then one for each of `scores`."""
    choices: list[ChoiceStream]
    """`n` for each prompt, prompt by prompt."""
    scores: list[PromptScores]
    """One for each prompt, or none."""
    encoder: ResponseEncoder
    """Makes the response's JSON: of chat or of text completions."""

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        firsts = self.choices[:: self.request.n]
        return Usage(
            prompt_tokens=sum(len(choice.prompt) for choice in firsts),
            completion_tokens=sum(choice.count for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in firsts),
        )


def make_job(
    request: GenerationRequest,
    ensemble: Ensemble,
    factory: SequenceFactory,
    prompts: Sequence[Prompt],
    encoder: ResponseEncoder,
) -> Job:
    sequences = factory.make(prompts)
    choices = [
        ChoiceStream(
            index=index,
            prompt=prompts[index // request.n],
            sequence=sequence,
            request=request,
            tokenizer=ensemble.tokenizer,
        )
        for index, sequence in enumerate(sequences)
    ]
    scoring = factory.scoring(prompts) if request.prompt_logprobs is not None else []
    scores = [PromptScores(index) for index in range(len(scoring))]
    return Job(
        request=request,
        model=ensemble.model,
        sequences=sequences + scoring,
        choices=choices,
        scores=scores,
        encoder=encoder,
    )


def check_number(request: GenerationRequest, limits: Limits, prompts: int) -> None:
    """More sequences than can ever run and queue would be refused for ever. Raises BadRequest."""
    limit = min(_MAX_SEQUENCES, limits.sequences + limits.queue)
    for_each = request.n + (request.prompt_logprobs is not None)
    if for_each > limit:
        raise BadRequest(f"n: a request may have at most {limit} sequences here", param="n")
    if prompts * for_each > limit:
        message = f"prompt: {prompts} prompts with {for_each} sequences each; a request may have at most {limit} here"
        raise BadRequest(message, param="prompt")
