"""POST /v1/completions: from prompts, as text or token ids, to a `Job`, and how its response is written."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from server.api.completions.choices import ChoiceDelta, ChoiceStream, PromptScores
from server.api.completions.encoder import ResponseEncoder
from server.api.completions.encoding import Encoded, encode, finite
from server.api.completions.ensemble import chosen_ensemble
from server.api.completions.job import Job, check_number, make_job
from server.api.completions.sequences import Prompt, SequenceFactory
from server.api.protocol import CompletionRequest
from server.api.summary import Usage
from server.api.tools.grammar import completion_grammar
from server.text.deployment import Deployment, Ensemble
from server.text.prompts import check_scorable, id_prompts, room, text_prompts


async def completion_job(
    deployment: Deployment, next_number: Callable[[], int], request: CompletionRequest, request_id: str
) -> Job:
    """Everything that can be refused is refused here, before a byte of the answer."""
    ensemble = chosen_ensemble(deployment, request.model, request.fusion)
    check_number(request, deployment.config.limits, prompts=len(request.prompt))
    grammar = await completion_grammar(request)
    factory = SequenceFactory(deployment, ensemble, request, next_number=next_number, grammar=grammar)
    prompts = await _prompts(ensemble, request)
    experts = deployment.config.expert_names
    encoder = CompletionEncoder(request, ensemble, identity=f"cmpl-{request_id}", experts=experts)
    return make_job(request, ensemble, factory, prompts, encoder)


async def _prompts(ensemble: Ensemble, request: CompletionRequest) -> list[Prompt]:
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    if texts:
        prompts = await text_prompts(ensemble, texts, add_special_tokens=request.add_special_tokens)
    else:
        prompts = [id_prompts(ensemble, prompt) for prompt in request.prompt if isinstance(prompt, list)]
    for ids in prompts:
        if request.scores_prompt:
            check_scorable(ensemble, ids, "echo")
        if request.prompt_logprobs is not None:
            check_scorable(ensemble, ids, "prompt_logprobs")
    if not request.echo:
        texts = [""] * len(prompts)
    elif not texts:  # ids are shown as they are, like vLLM does
        texts = await asyncio.to_thread(lambda: [ensemble.tokenizer.decode(ids[0]) for ids in prompts])
    return [
        Prompt(ids, room(ensemble, ids, "prompt"), scored=request.scores_prompt, echo=text)
        for ids, text in zip(prompts, texts, strict=True)
    ]


class CompletionEncoder(ResponseEncoder):
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, request: CompletionRequest, ensemble: Ensemble, *, identity: str, experts: list[str]) -> None:
        super().__init__(request, ensemble, identity=identity, experts=experts)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # choice -> characters of its tokens so far

    def opening(self, choices: Sequence[ChoiceStream]) -> bytes:
        return b""

    def chunk(self, choice: ChoiceStream) -> bytes:
        delta = choice.take()
        logprobs = b"null" if self.request.alternatives is None else encode(self.logprobs(choice, delta))
        text = b'{"index":%d,"text":%b,"logprobs":%b' % (choice.index, encode(delta.text), logprobs)
        return self.head + text + self.end_of_choice(choice, delta)

    def about_prompt(self, choice: ChoiceStream) -> dict[str, Any]:
        return {"prompt_token_ids": choice.prompt} if self.request.return_token_ids else {}

    def response(self, choices: Sequence[ChoiceStream], scores: Sequence[PromptScores], usage: Usage) -> list[Encoded]:
        return self.envelope([self._choice(choice, scores) for choice in choices], usage)

    def _choice(self, choice: ChoiceStream, scores: Sequence[PromptScores]) -> list[Encoded]:
        more = self.prompt_logprobs(scores[choice.index // self.request.n]) if scores else []
        return self.choice(choice, b'"text":' + encode(self.text_of(choice)), *more)

    def logprobs(self, choice: ChoiceStream, delta: ChoiceDelta) -> dict[str, list[Any]]:
        tokens = [self._text(token) for token in delta.tokens]
        unknown = [None] * (len(tokens) - len(delta.details))  # nothing comes before a prompt's first token
        logprobs: dict[str, Any] = {
            "text_offset": [self._offset(choice.index, token) for token in tokens],
            "token_logprobs": unknown + [finite(details.logprob) for details in delta.details],
            "tokens": tokens,
            "top_logprobs": unknown
            + [
                self._top(token, details.logprob, details.top)
                for token, details in zip(tokens[len(unknown) :], delta.details, strict=True)
            ],
        }
        if self.request.expert_weights:
            logprobs["expert_weights"] = self.weights(delta)
        return logprobs

    def _top(self, token: str, logprob: float, top: list[tuple[int, float]]) -> dict[str, float]:
        """The alternatives asked for, and the chosen token if it is not among them."""
        shown = {token: finite(logprob)}
        for other, value in top[: self.request.alternatives]:
            shown.setdefault(self._text(other), finite(value))
        return shown

    def _offset(self, index: int, token: str) -> int:
        offset = self._offsets[index]
        self._offsets[index] += len(token)
        return offset

    def _text(self, token: int) -> str:
        return self.tokenizer.shown(token).text
