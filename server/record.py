"""`polylogit record`: graded responses through the real deployment, traced, for a gate to learn from.

Every planned response is a task with a number; what is on disk already is not made again, so the same command goes on
after an interruption. Responses are graded in threads while the engines go on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gate import checkpoint
from gate.contract import CheckpointError, mismatches, sha256_file, vocabulary_hash
from gate.graders import Grader, load_grader
from gate.prompts import PromptsError, check_gradable, read_prompts, read_rows
from gate.recording import save_recording_gate, wrap
from gate.traces import FORMAT_VERSION, Manifest, Response, TraceWriter
from server.check import check
from server.config import Config, GateConfig, load_config
from server.errors import ConfigError
from server.local import LocalDeployment
from server.model_files import ModelFiles, fingerprint, read_model_files
from server.policy import Gate, Policy, Single, needs_gate
from server.rollout import Rollout, Rollouts, Task, Texts

GIVEN = ("answer", "response")
"""Sources that are not drawn: the prompts file's answers, and a responses file's."""
_GRADE_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """All responses of a recording, in the order of their numbers. `source` is an index into `sources`."""

    rows: list[dict[str, Any]]
    sources: list[str]
    policies: list[Policy]
    given: list[list[tuple[int, str]]]  # for each row (source, text)
    samples: int
    temperature: float
    seed: int

    @property
    def size(self) -> int:
        drawn = len(self.rows) * self.samples * (len(self.policies) - sum(name in GIVEN for name in self.sources))
        return drawn + sum(map(len, self.given))

    def tasks(self, texts: Texts, done: set[int]) -> Iterator[tuple[Task, int, int]]:
        """(task, row, source) for every number that is not `done`."""
        number = -1
        for row, given in enumerate(self.rows):
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
            prompts = texts.prompts(given)
            for task, (source, text) in zip(numbers, planned, strict=True):
                if task not in done:
                    yield self._task(task, prompts, source, None if text is None else texts.response(text)), row, source

    def _task(self, number: int, prompts: list[list[int]], source: int, given: list[int] | None) -> Task:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0])
        return Task(number, prompts, self.policies[source], self.temperature, seed, given or [])


def record(options: argparse.Namespace) -> int:
    """Run the command with parsed options; the exit code."""
    config = load_config(options.config)
    check(msgspec.structs.replace(config, gate=None))
    grader = load_grader(options.grader)
    plan = _plan(config, options)
    check_gradable(plan.rows, grader)
    texts = Texts(config)
    console = Console(stderr=True)
    if isolation := getattr(grader, "isolation", None):
        console.print(f"code runs in a sandbox: {isolation}", highlight=False)
    with closing(TraceWriter(options.output, _manifest(config, options, plan))) as writer:
        left = plan.size - len(writer.done)
        if not left:
            console.print(f"{options.output}: all {plan.size} responses are there", highlight=False)
            return 0
        with (
            recording_deployment(config, hidden=options.hidden, gate=options.gate) as (deployment, _),
            _bar(console) as bar,
        ):
            rollouts = Rollouts(
                deployment,
                stop_token_ids=texts.stop_token_ids,
                max_tokens=options.max_tokens,
                in_flight=2 * config.limits.sequences,
            )
            progress = bar.add_task("responses", total=plan.size, completed=len(writer.done))
            rewards: dict[str, list[float]] = defaultdict(list)
            for response in _graded(rollouts, plan, texts, grader, writer.done, _sizes(config, options.hidden)):
                writer.add(response)
                rewards[plan.sources[response.source]].append(response.reward)
                bar.advance(progress)
    console.print(_table(rewards))
    print(f"{plan.size} responses -> {options.output}")
    return 0


@contextmanager
def recording_deployment(
    config: Config, *, hidden: bool, gate: Path | None = None
) -> Iterator[tuple[LocalDeployment, Path]]:
    """The deployment, started with a recording gate around `gate` instead of its own gate; (it, a directory for more
    such checkpoints). Without `hidden`, with `gate` as it is. Raises StartError, CheckpointError."""
    with tempfile.TemporaryDirectory(prefix="polylogit-") as directory:
        file = gate
        if hidden:
            file = Path(directory) / "recording.pt"
            _save_recording_gate(config, gate, file)
        limits = msgspec.structs.replace(config.limits, queue=max(config.limits.queue, config.limits.sequences))
        chosen = None if file is None else GateConfig(str(file.resolve()), on_failure="fail")
        with LocalDeployment(msgspec.structs.replace(config, gate=chosen, limits=limits)) as deployment:
            yield deployment, Path(directory)


def hidden_sizes(config: Config) -> list[int]:
    """H_i of each expert."""
    return [files.hidden_size for files in _files(config)]


def vocabulary_of(config: Config) -> str:
    """The hash of the experts' vocabulary."""
    return vocabulary_hash(config.path(config.experts[0].model) / "tokenizer.json")


def fingerprints(config: Config) -> list[str]:
    """What tells one expert from another, for each."""
    return [
        fingerprint(files, [expert.dtype, expert.system_prompt, _template(config, expert.chat_template)])
        for files, expert in zip(_files(config), config.experts, strict=True)
    ]


def _template(config: Config, file: str | None) -> str | None:
    return None if file is None else config.path(file).read_text(encoding="utf-8")


def _files(config: Config) -> list[ModelFiles]:
    return [read_model_files(config.path(expert.model)) for expert in config.experts]


def _sizes(config: Config, hidden: bool) -> list[int]:
    return hidden_sizes(config) if hidden else []


def _save_recording_gate(config: Config, gate: Path | None, path: Path) -> None:
    sizes, vocabulary = hidden_sizes(config), vocabulary_of(config)
    if gate is None:
        save_recording_gate(
            path, experts=config.expert_names, vocabulary_hash=vocabulary, top_k=config.top_k, hidden_sizes=sizes
        )
        return
    loaded = checkpoint.load(gate)
    problems = mismatches(
        loaded.contract,
        experts=config.expert_names,
        vocabulary_hash=vocabulary,
        top_k=config.top_k,
        hidden_sizes=sizes,
    )
    if problems:
        raise CheckpointError(f"{gate}: {'; '.join(problems)}")
    wrap(loaded.module, loaded.contract, sizes, path)


def _plan(config: Config, options: argparse.Namespace) -> Plan:
    rows = read_prompts(options.prompts, options.limit)
    policies = _policies(config, options)
    given = _given(rows, options)
    sources = [name for name, wanted in zip(GIVEN, (options.answers, options.responses), strict=True) if wanted]
    everything: Policy = Single(config.expert_names[0])  # a given token is fused too, whatever for
    return Plan(
        rows=rows,
        sources=sources + list(policies),
        policies=[everything] * len(sources) + list(policies.values()),
        given=[[(sources.index(source), text) for source, text in texts] for texts in given],
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
    )


def _policies(config: Config, options: argparse.Namespace) -> dict[str, Policy]:
    """What draws responses: name -> policy."""
    offered: dict[str, Policy] = {name: Single(name) for name in config.expert_names}
    offered |= {name: policy for name, policy in config.policies.items() if not needs_gate(policy)}
    names = list(offered) if options.policies is None else [name for name in options.policies.split(",") if name]
    if unknown := [name for name in names if name not in offered]:
        raise ConfigError(f"--policies: {unknown[0]!r} is not one of {', '.join(offered)} (a gate comes with --gate)")
    chosen = {name: offered[name] for name in names}
    if options.gate is not None:
        chosen["gate"] = Gate()
    if not chosen and not options.answers and options.responses is None:
        raise ConfigError("--policies: names nothing, and there is no --gate, --answers or --responses")
    return chosen


def _given(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[list[tuple[str, str]]]:
    """For each row, (source, text) of the responses that are given."""
    given: list[list[tuple[str, str]]] = [[] for _ in rows]
    if options.answers:
        for row, texts in zip(rows, given, strict=True):
            if not isinstance(row.get("answer"), str):
                raise PromptsError(f'--answers: prompt {row["id"]!r} has no "answer" (a string)')
            texts.append(("answer", row["answer"]))
    if options.responses is not None:
        place = {row["id"]: number for number, row in enumerate(rows)}
        for number, line in enumerate(read_rows(options.responses), 1):
            if line.get("id") not in place or not isinstance(line.get("response"), str):
                needed = 'needs the "id" of a prompt and "response" (a string)'
                raise PromptsError(f"{options.responses}:{number}: {needed}")
            given[place[line["id"]]].append(("response", line["response"]))
    return given


def _manifest(config: Config, options: argparse.Namespace, plan: Plan) -> Manifest:
    files = _files(config)
    return Manifest(
        format_version=FORMAT_VERSION,
        experts=config.expert_names,
        models=fingerprints(config),
        vocabulary_hash=vocabulary_of(config),
        vocabulary_size=files[0].vocab_size,
        top_k=min(config.top_k, files[0].vocab_size),
        hidden_sizes=_sizes(config, options.hidden),
        prompts=sha256_file(options.prompts),
        grader=options.grader,
        sources=plan.sources,
        settings={
            "limit": options.limit,
            "samples": options.samples,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
            "missing": config.missing,
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
        reward = reward_of(rollout, plan.rows[row], texts, grader)
        return to_response(rollout, row, plan.rows[row]["id"], source, reward, sizes)

    with ThreadPoolExecutor(grader.workers) as pool:
        waiting: set[Future[Response]] = set()
        for rollout in rollouts.run(tasks()):
            waiting.add(pool.submit(grade, rollout))
            if len(waiting) > _GRADE_AHEAD * grader.workers:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        yield from (future.result() for future in waiting)


def reward_of(rollout: Rollout, row: dict[str, Any], texts: Texts, grader: Grader) -> float:
    """What the grader gives; 0 for a response that was cut at its most tokens."""
    return grader(row, texts.text(rollout.tokens.tolist())) if rollout.finished else 0.0


def to_response(rollout: Rollout, row: int, name: str, source: int, reward: float, sizes: list[int]) -> Response:
    """A rollout with its reward, as it is kept. `sizes`: H_i of each expert, empty to leave hidden states out."""
    return Response(
        task=rollout.task.number,
        prompt=row,
        prompt_id=name,
        source=source,
        temperature=rollout.task.temperature,
        reward=reward,
        tokens=rollout.tokens,
        topk_ids=rollout.ids,
        topk_logprobs=rollout.logprobs,
        hidden=[rollout.projected[:, index, :size] for index, size in enumerate(sizes)],
    )


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
