"""What the routes are given: the deployment, the coordinator's client and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.client import EngineClient
from server.api.completions.answers import Answer, PromptScores
from server.api.completions.reply import Job, Reply
from server.api.completions.sequences import Prompt, SequenceFactory
from server.api.completions.shapes import Shape
from server.api.protocol import GenerationRequest
from server.errors import BadRequest
from server.metrics.api import ApiMetrics
from server.text.deployment import Deployment, Ensemble

_MAX_SEQUENCES = 1024
"""Of one request."""


@dataclass(frozen=True, slots=True)
class Services:
    deployment: Deployment
    client: EngineClient
    metrics: ApiMetrics

    def check_number(self, request: GenerationRequest, prompts: int) -> None:
        """More sequences than can ever run and queue would be refused for ever. Raises BadRequest."""
        limits = self.deployment.config.limits
        limit = min(_MAX_SEQUENCES, limits.sequences + limits.queue)
        for_each = request.n + (request.prompt_logprobs is not None)
        if for_each > limit:
            raise BadRequest(f"n: at most {limit} sequences", param="n")
        if prompts * for_each > limit:
            raise BadRequest(f"prompt: at most {limit} prompts times {for_each} sequences", param="prompt")

    def sequences(self, ensemble: Ensemble, request: GenerationRequest, grammar: str | None) -> SequenceFactory:
        """Raises BadRequest for what only the vocabulary shows to be wrong."""
        return SequenceFactory(self.deployment, ensemble, request, self.client.number, grammar)

    def job(
        self,
        request: GenerationRequest,
        ensemble: Ensemble,
        factory: SequenceFactory,
        prompts: Sequence[Prompt],
        shape: Shape,
    ) -> Job:
        sequences = factory.make(prompts)
        answers = [
            Answer(
                index,
                prompts[index // request.n].ids[0],
                request,
                ensemble.tokenizer,
                max_tokens=sequence.max_tokens - len(sequence.given),
                given=len(sequence.given),
                echo=prompts[index // request.n].echo,
                stop_token_ids=factory.stop_token_ids,
            )
            for index, sequence in enumerate(sequences)
        ]
        scoring = factory.scoring(prompts) if request.prompt_logprobs is not None else []
        scores = [PromptScores(index) for index in range(len(scoring))]
        return Job(sequences + scoring, answers, scores, shape, request, ensemble.model)

    def reply(self, job: Job) -> Reply:
        return Reply(job, self.client, self.metrics, self.deployment.config.http)
