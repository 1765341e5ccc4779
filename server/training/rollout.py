"""Responses from a running deployment, recorded: for `polylogit record`, and for the samples that `polylogit train`
learns from. Prompts are rendered for each expert as the api does; token ids go in, token ids and what every expert
showed come out. Many sequences run at once; the engines batch them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from gate.evaluation.prompts import Question
from gate.training.records import SampledBy
from server.config import Config
from server.errors import BadRequest, EngineError, StartError
from server.launch.local import LocalDeployment
from server.policy import Policy
from server.request import FinishReason, SamplingParams, SequenceRequest
from server.text.conversation import Conversation
from server.text.deployment import Deployment
from server.text.model_files import read_model_files
from server.text.prompts import Chat
from server.wire.api import Ended, Progress, Recorded

Array = npt.NDArray[Any]

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """One response to make."""

    number: int
    """What the task is called."""
    prompts: list[list[int]]
    """Token ids for each expert."""
    policy: Policy
    """What samples it."""
    temperature: float = 1.0
    """Of the sampling; 0 is greedy."""
    seed: int = 0
    """Of the sampling."""
    given: list[int] = field(default_factory=list)
    """If any, the response is these tokens, and is only scored."""
    keep_law: bool = False
    """What samples each token is kept, too: its normaliser is known within the configured tolerance then."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """What became of a task: T tokens, E experts, K listed ids."""

    task: Task
    """Which."""
    tokens: Array
    """int32 [T], the response's own."""
    ids: Array
    """int32 [T, E, K], each expert's list at each token."""
    logprobs: Array
    """float32 [T, E, K], best first."""
    projected: Array
    """float16 [T, E, d], the experts' hidden states, padded to the widest, under a recording gate; d is 0 without."""
    token_logprobs: Array
    """float32 [T, E], each expert's of the response's token."""
    law: SampledBy | None
    """What sampled it, if the task wanted to know."""
    finished: bool
    """It ended by itself, or was given."""


class Texts:
    """The deployment's experts as text."""

    def __init__(self, config: Config) -> None:
        """Reads every expert's files. Raises StartError."""
        self._experts = Deployment(config).experts
        self.stop_token_ids = sorted(frozenset[int]().union(*(expert.eos_token_ids for expert in self._experts)))
        files = read_model_files(config.path(config.experts[0].model), weights=False)
        named = self._experts[0].tokenizer.core.token_to_id(files.special_tokens.get("eos_token", ""))
        if named is None and not self.stop_token_ids:
            raise StartError(f"expert {self._experts[0].name}: its files name no end token")
        self._end = self.stop_token_ids[0] if named is None else named

    def prompts(self, question: Question) -> list[list[int]]:
        """The prompt of a question (its messages, perhaps "tools"), for each expert. Raises StartError."""
        row = question.row
        try:
            chat = Chat(Conversation.model_validate({key: row[key] for key in ("messages", "tools") if key in row}))
            return [chat.ids(expert) for expert in self._experts]
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise StartError(f"prompt {question.id!r}: {where}: {fault['msg']}") from None
        except BadRequest as error:
            raise StartError(f"prompt {question.id!r}: {error.message}") from None

    def check(self, question: Question, responses: list[str]) -> None:
        """Raises StartError if the prompt, or it with one of the responses, does not fit an expert's context."""
        longest = max((len(self.response(text)) for text in responses), default=1)
        for expert, prompt in zip(self._experts, self.prompts(question), strict=True):
            if len(prompt) + longest > expert.max_model_len:
                length = f"{len(prompt)} tokens and a response of {longest}"
                raise StartError(
                    f"prompt {question.id!r}: {length}; expert {expert.name} has room for {expert.max_model_len}"
                )

    def response(self, text: str) -> list[int]:
        """Token ids of a whole response, end token included."""
        return [*self._experts[0].tokenizer.encode_literally(text), self._end]

    def text(self, tokens: list[int]) -> str:
        """Text of a response, without special tokens."""
        return self._experts[0].tokenizer.decode(tokens, skip_special_tokens=True)


class Rollouts:
    """Runs tasks through `deployment`, at most `in_flight` of them at once, each at most `max_tokens` long."""

    def __init__(
        self, deployment: LocalDeployment, *, stop_token_ids: list[int], max_tokens: int, in_flight: int
    ) -> None:
        self._deployment = deployment
        self._stop_token_ids = stop_token_ids
        self._max_tokens = max_tokens
        self._in_flight = in_flight
        self._number = 0
        self._running: dict[int, _Growing] = {}

    def run(self, tasks: Iterable[Task]) -> Iterator[Rollout]:
        """Rollouts in the order in which they end. Raises EngineError if the deployment fails or refuses one."""
        waiting = iter(tasks)
        left = self._submit(waiting, self._in_flight)
        while self._running:
            ended = [self._rollout(ended) for ended in self._receive()]
            if left and len(self._running) <= self._in_flight // 2:
                left = self._submit(waiting, self._in_flight - len(self._running))
            yield from ended

    def _submit(self, waiting: Iterator[Task], room: int) -> bool:
        """Submit up to `room` more tasks; whether there may be more."""
        tasks = list(islice(waiting, room))
        requests = []
        for task in tasks:
            self._number += 1
            self._running[self._number] = _Growing(task)
            requests.append(self._request(self._number, task))
        if requests:
            self._deployment.submit(requests)
        return len(tasks) == room

    def _request(self, number: int, task: Task) -> SequenceRequest:
        return SequenceRequest(
            number,
            task.prompts,
            task.policy,
            SamplingParams(temperature=task.temperature, seed=task.seed),
            max_tokens=len(task.given) or self._max_tokens,
            stop_token_ids=[] if task.given else self._stop_token_ids,
            given=task.given,
            record=True,
            top_logprobs=0 if task.keep_law else None,
        )

    def _receive(self) -> list[Ended]:
        """Take one message; the sequences that it ended."""
        message = self._deployment.receive(_LOOK_SECONDS)
        match message:
            case None:
                self._deployment.check()
            case Recorded():
                self._note(message)
            case Progress(sequences=sequences, tokens=tokens, details=details):
                for sequence, token in zip(sequences, tokens, strict=True):
                    self._running[sequence].tokens.append(token)
                for sequence, detail in details.items():
                    self._running[sequence].coefficients.append(detail.coefficients)
            case Ended():
                return [message]
        return []

    def _note(self, record: Recorded) -> None:
        if not (rows := len(record.sequences)):
            return  # all were lost: their ends follow
        experts = len(self._running[record.sequences[0]].task.prompts)
        ids = np.frombuffer(record.ids, np.int32).reshape(rows, experts, -1)
        logprobs = np.frombuffer(record.logprobs, np.float32).reshape(rows, experts, -1)
        projected = _half(np.frombuffer(record.projected, np.float32)).reshape(rows, experts, -1)
        token_logprobs = np.frombuffer(record.token_logprobs, np.float32).reshape(rows, experts)
        log_normaliser = np.frombuffer(record.log_normaliser, np.float32).tolist()
        for row, sequence in enumerate(record.sequences):
            growing = self._running[sequence]
            growing.ids.append(ids[row].copy())
            growing.logprobs.append(logprobs[row].copy())
            growing.projected.append(projected[row].copy())
            growing.token_logprobs.append(token_logprobs[row].copy())
            growing.log_normaliser.append(log_normaliser[row])

    def _rollout(self, ended: Ended) -> Rollout:
        growing = self._running.pop(ended.sequence)
        if ended.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise EngineError(f"a response could not be made: {ended.message or ended.reason}")
        return Rollout(
            growing.task,
            np.array(growing.tokens, np.int32),
            np.stack(growing.ids),
            np.stack(growing.logprobs),
            np.stack(growing.projected),
            np.stack(growing.token_logprobs),
            growing.law() if growing.task.keep_law else None,
            finished=bool(growing.task.given) or ended.reason is FinishReason.STOP,
        )


@dataclass(slots=True)
class _Growing:
    """A rollout on its way."""

    task: Task
    tokens: list[int] = field(default_factory=list)
    ids: list[Array] = field(default_factory=list)
    logprobs: list[Array] = field(default_factory=list)
    projected: list[Array] = field(default_factory=list)
    token_logprobs: list[Array] = field(default_factory=list)
    log_normaliser: list[float] = field(default_factory=list)
    coefficients: list[list[float]] = field(default_factory=list)

    def law(self) -> SampledBy:
        return SampledBy(np.array(self.coefficients, np.float32), np.array(self.log_normaliser, np.float32))


def _half(values: Array) -> Array:
    """float32 -> float16, never infinite."""
    largest = np.finfo(np.float16).max
    return values.clip(-largest, largest).astype(np.float16)
