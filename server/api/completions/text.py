"""POST /v1/completions: from prompts, as text or token ids, to a `Job`, and the shape of its answers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from server.api.completions.answers import Answer, Piece, PromptScores
from server.api.completions.fusion import chosen_ensemble
from server.api.completions.reply import Job
from server.api.completions.sequences import Prompt
from server.api.completions.shapes import Common, Part, Usage, encode, finite
from server.api.protocol import CompletionRequest
from server.api.services import Services
from server.api.tools.grammar import completion_grammar
from server.text.deployment import Ensemble
from server.text.prompts import check_scorable, id_prompts, room, text_prompts


async def completion_job(services: Services, request: CompletionRequest, request_id: str) -> Job:
    """Everything that can be refused is refused here, before a byte of the answer."""
    ensemble = chosen_ensemble(services.deployment, request.model, request.fusion)
    services.check_number(request, len(request.prompt))
    factory = services.sequences(ensemble, request, await completion_grammar(request))
    prompts = await _prompts(ensemble, request)
    shape = CompletionShape(
        request,
        ensemble.tokenizer,
        identity=f"cmpl-{request_id}",
        model=ensemble.model,
        experts=services.deployment.config.expert_names,
    )
    return services.job(request, ensemble, factory, prompts, shape)


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


class CompletionShape(Common):
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # choice -> characters of its tokens so far

    def opening(self, answers: Sequence[Answer]) -> bytes:
        return b""

    def chunk(self, answer: Answer) -> bytes:
        piece = answer.take()
        logprobs = b"null" if self.request.alternatives is None else encode(self.logprobs(answer, piece))
        text = b'{"index":%d,"text":%b,"logprobs":%b' % (answer.index, encode(piece.text), logprobs)
        return self.head + text + self.end_of_choice(answer, piece)

    def about_prompt(self, answer: Answer) -> dict[str, Any]:
        return {"prompt_token_ids": answer.prompt} if self.request.return_token_ids else {}

    def response(self, answers: Sequence[Answer], scores: Sequence[PromptScores], usage: Usage) -> list[Part]:
        return self.envelope([self._choice(answer, scores) for answer in answers], usage)

    def _choice(self, answer: Answer, scores: Sequence[PromptScores]) -> list[Part]:
        more = self.prompt_logprobs(scores[answer.index // self.request.n]) if scores else []
        return self.choice(answer, b'"text":' + encode(self.text_of(answer)), *more)

    def logprobs(self, answer: Answer, piece: Piece) -> dict[str, list[Any]]:
        tokens = [self._text(token) for token in piece.tokens]
        unknown = [None] * (len(tokens) - len(piece.choices))  # nothing comes before a prompt's first token
        logprobs: dict[str, Any] = {
            "text_offset": [self._offset(answer.index, token) for token in tokens],
            "token_logprobs": unknown + [finite(choice.logprob) for choice in piece.choices],
            "tokens": tokens,
            "top_logprobs": unknown
            + [
                self._top(token, choice.logprob, choice.top)
                for token, choice in zip(tokens[len(unknown) :], piece.choices, strict=True)
            ],
        }
        if self.request.expert_weights:
            logprobs["expert_weights"] = self.weights(piece)
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
