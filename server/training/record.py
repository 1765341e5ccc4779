"""`polylogit record`: graded responses through the real deployment, recorded, for a gate to learn from.

Every planned response is a task with a number; what is on disk already is not made again, so the same command goes on
after an interruption. Responses are graded in threads while the engines go on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gate.evaluation.graders import Grader, load_grader
from gate.evaluation.prompts import PromptsError, Question, check_gradable, numbered_rows, read_prompts
from gate.files import sha256_file
from gate.training.records import FORMAT_VERSION, Manifest, RecordWriter, Response
from server.config import Config
from server.errors import ConfigError
from server.launch.check import check
from server.logs import LogOptions
from server.policy import Gate, Policy, Single, needs_gate
from server.training.options import RecordOptions
from server.training.recorder import (
    chosen_gate,
    fingerprints,
    hidden_sizes,
    read_config,
    recording_deployment,
    reward_of,
    seed_of,
    to_response,
    vocabulary_of,
    vocabulary_size,
)
from server.training.rollout import Rollout, Rollouts, Task, Texts

GIVEN = ("answer", "response")
"""Sources that are not sampled: the prompts file's answers, and a responses file's."""
_GRADE_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """All responses of a recording, in the order of their numbers."""

    questions: list[Question]
    """To respond to."""
    sources: list[str]
    """Names of what writes responses; elsewhere a source is an index into them."""
    policies: list[Policy]
    """Of each source; of one that is not sampled, any."""
    given: list[list[tuple[int, str]]]
    """For each question (source, text) of the responses that are not sampled."""
    samples: int
    """Responses of each other source to each question."""
    temperature: float
    """Of the sampling."""
    seed: int
    """Of the sampling."""

    @property
    def size(self) -> int:
        sampling = sum(name not in GIVEN for name in self.sources)
        return len(self.questions) * self.samples * sampling + sum(map(len, self.given))

    def tasks(self, texts: Texts, done: set[int]) -> Iterator[tuple[Task, int, int]]:
        """(task, row, source) for every number that is not `done`."""
        number = -1
        for row, question in enumerate(self.questions):
            planned: list[tuple[int, str | None]] = list(self.given[row])
            planned += [
                (source, None)
                for source, name in enumerate(self.sources)
                if name not in GIVEN
                for _ in range(self.samples)
            ]
            numbers = range(number + 1, number + 1 + len(planned))
            number += len(planned)
            if done.issuperset(numbers):
                continue
            prompts = texts.prompts(question)
            for task, (source, text) in zip(numbers, planned, strict=True):
                if task not in done:
                    yield self._task(task, prompts, source, None if text is None else texts.response(text)), row, source

    def _task(self, number: int, prompts: list[list[int]], source: int, given: list[int] | None) -> Task:
        seed = seed_of(self.seed, number)
        return Task(number, prompts, self.policies[source], self.temperature, seed, given or [])


def record(options: RecordOptions, log_options: LogOptions) -> int:
    """Run the command; the exit code."""
    config = read_config(options.config, log_options)
    check(msgspec.structs.replace(config, gate=None))
    grader = load_grader(options.grader)
    plan = _plan(config, options)
    check_gradable(plan.questions, grader)
    gate = chosen_gate(config, options.gate, options.top_k)
    texts = Texts(config)
    for question, given in zip(plan.questions, plan.given, strict=True):
        texts.check(question, [text for _, text in given])
    console = Console(stderr=True)
    if isolation := getattr(grader, "isolation", None):
        console.print(f"code runs in a sandbox: {isolation}", highlight=False, soft_wrap=True)
    sizes = _sizes(config, not options.no_hidden)
    with closing(RecordWriter(options.output, _manifest(config, options, plan, gate[1].top_k))) as writer:
        if len(writer.done) == plan.size:
            console.print(f"{options.output}: all {plan.size} responses are there", highlight=False, soft_wrap=True)
            return 0
        with recording_deployment(config, sizes, gate) as (deployment, _):
            rollouts = Rollouts(
                deployment,
                stop_token_ids=texts.stop_token_ids,
                max_tokens=options.max_tokens,
                in_flight=2 * config.limits.sequences,
            )
            responses = _graded(rollouts, plan, texts, grader, writer.done, sizes)
            rewards = _write(responses, writer, plan, console)
    console.print(_table(rewards))
    print(f"{plan.size} responses -> {options.output}")
    return 0


def _write(responses: Iterator[Response], writer: RecordWriter, plan: Plan, console: Console) -> dict[str, list[float]]:
    """Write responses as they come, under a progress bar; their rewards by source."""
    rewards: dict[str, list[float]] = defaultdict(list)
    with _bar(console) as bar:
        progress = bar.add_task("responses", total=plan.size, completed=len(writer.done))
        for response in responses:
            writer.add(response)
            rewards[plan.sources[response.source]].append(response.reward)
            bar.advance(progress)
    return rewards


def _sizes(config: Config, hidden: bool) -> list[int]:
    return hidden_sizes(config) if hidden else []


def _plan(config: Config, options: RecordOptions) -> Plan:
    questions = read_prompts(options.prompts, options.limit)
    policies = _policies(config, options)
    given = _given(questions, options)
    sources = [name for name, wanted in zip(GIVEN, (options.answers, options.responses), strict=True) if wanted]
    everything: Policy = Single(config.expert_names[0])  # a given token is fused too, whatever for
    return Plan(
        questions=questions,
        sources=sources + list(policies),
        policies=[everything] * len(sources) + list(policies.values()),
        given=[[(sources.index(source), text) for source, text in texts] for texts in given],
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
    )


def _policies(config: Config, options: RecordOptions) -> dict[str, Policy]:
    """What samples responses: name -> policy."""
    offered: dict[str, Policy] = {name: Single(name) for name in config.expert_names}
    offered |= {name: policy for name, policy in config.policies.items() if not needs_gate(policy)}
    names = offered if options.policies is None else options.policies
    if unknown := [name for name in names if name not in offered]:
        raise ConfigError(f"--policies: {unknown[0]!r} is not one of {', '.join(offered)} (a gate comes with --gate)")
    chosen = {name: offered[name] for name in names}
    for name in (*GIVEN, *([] if options.gate is None else ["gate"])):
        if name in chosen:
            other = "what other responses of a recording are called; rename it, or leave it out with --policies"
            raise ConfigError(f"{name!r} (an expert or policy) is {other}")
    if options.gate is not None:
        chosen["gate"] = Gate()
    if not chosen and not options.answers and options.responses is None:
        raise ConfigError("--policies: names nothing, and there is no --gate, --answers or --responses")
    return chosen


def _given(questions: list[Question], options: RecordOptions) -> list[list[tuple[str, str]]]:
    """For each question, (source, text) of the responses that are given."""
    given: list[list[tuple[str, str]]] = [[] for _ in questions]
    if options.answers:
        for question, texts in zip(questions, given, strict=True):
            if not isinstance(answer := question.row.get("answer"), str):
                raise PromptsError(f'--answers: prompt {question.id!r} has no "answer" (a string)')
            texts.append(("answer", answer))
    if options.responses is not None:
        place = {question.id: number for number, question in enumerate(questions)}
        for number, line in numbered_rows(options.responses):
            if (key := str(line.get("id"))) not in place or not isinstance(line.get("response"), str):
                needed = 'needs the "id" of a prompt and "response" (a string)'
                raise PromptsError(f"{options.responses}:{number}: {needed}")
            given[place[key]].append(("response", line["response"]))
    return given


def _manifest(config: Config, options: RecordOptions, plan: Plan, top_k: int) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        experts=config.expert_names,
        models=fingerprints(config),
        vocabulary_hash=vocabulary_of(config),
        vocabulary_size=vocabulary_size(config),
        top_k=top_k,
        hidden_sizes=_sizes(config, not options.no_hidden),
        prompts=sha256_file(options.prompts),
        grader=options.grader,
        sources=plan.sources,
        settings={
            "limit": options.limit,
            "samples": options.samples,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
            "policies": msgspec.to_builtins(plan.policies),
            "responses": None if options.responses is None else sha256_file(options.responses),
            "gate": None if options.gate is None else sha256_file(options.gate),
        },
    )


def _graded(
    rollouts: Rollouts, plan: Plan, texts: Texts, grader: Grader, done: set[int], sizes: list[int]
) -> Iterator[Response]:
    """Graded responses in the order in which they are graded; not many more than the graders can take are kept
    waiting."""
    of: dict[int, tuple[int, int]] = {}

    def tasks() -> Iterator[Task]:
        for task, row, source in plan.tasks(texts, done):
            of[task.number] = (row, source)
            yield task

    def grade(rollout: Rollout) -> Response:
        row, source = of.pop(rollout.task.number)
        question = plan.questions[row]
        reward = reward_of(rollout, question, texts, grader)
        return to_response(rollout, row, question.id, source, reward, sizes)

    with ThreadPoolExecutor(grader.workers) as pool:
        waiting: set[Future[Response]] = set()
        for rollout in rollouts.run(tasks()):
            waiting.add(pool.submit(grade, rollout))
            if len(waiting) > _GRADE_AHEAD * grader.workers:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        yield from (future.result() for future in waiting)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _table(rewards: dict[str, list[float]]) -> Table:
    table = Table("source", "responses", "mean reward")
    for source, values in sorted(rewards.items()):
        table.add_row(source, str(len(values)), f"{np.mean(values):.3f}")
    return table
