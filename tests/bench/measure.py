"""The measurements of `tests.bench.truncation`."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass

import torch

from server.config import parse_config
from server.launch.local import LocalDeployment
from server.policy import Policy, Product, Uniform
from server.tools.provenance import cpu_times, steal
from tests.support import demo
from tests.support.oracle import truncated
from tests.support.oracle.huggingface import Reference
from tests.support.paths import ROOT
from tests.support.sequences import greedy
from tests.support.teacher_forcing import Texts, served

REPORT = ROOT / "docs" / "benchmarks"
SIZES = [8, 32, 128]
SEQUENCES = [1, 8, 32]
TOKENS = 64
POLICIES: dict[str, tuple[Policy, list[float], str]] = {
    "uniform, logprob": (Uniform(), [1 / 3] * 3, "logprob"),
    "product": (Product(), [1.0] * 3, "logprob"),
    "uniform, prob": (Uniform(space="prob"), [1 / 3] * 3, "prob"),
}


@dataclass(frozen=True)
class Distance:
    """Total variation of one setting under one policy, over all positions. `agreement`: share of equal winners."""

    k: int
    policy: str
    mean: float
    p95: float
    largest: float
    agreement: float


@dataclass(frozen=True)
class Speed:
    """Median milliseconds per decoding step: over the rounds, of the median within a run. `steal`: share of processor
    time taken by the host meanwhile."""

    k: int
    sequences: int
    milliseconds: float
    steal: float


def measure(prompts: int, rounds: int) -> None:
    """Measure over `prompts` of the held-out prompts, with `rounds` rounds of each timing; write files."""
    started = time.monotonic()
    texts = Texts(Reference([demo.model(name) for name in demo.EXPERTS]), prompts)
    print(f"{len(texts.prefixes)} positions of {prompts} prompts", flush=True)
    distances: list[Distance] = []
    speeds: list[Speed] = []
    for k in SIZES:
        with deployment(k) as chosen:
            distances += measure_distances(chosen, texts, k)
            speeds += measure_speeds(chosen, k, rounds)
        print(f"k = {k} done after {time.monotonic() - started:.0f} s", flush=True)
    write(distances, speeds, len(texts.prefixes), prompts)


def deployment(k: int) -> LocalDeployment:
    data = demo.configuration(list_length=k, limits={"queue": 4096, "sequences": 64})
    return LocalDeployment(parse_config(data, directory=demo.DEMO))


def measure_distances(chosen: LocalDeployment, texts: Texts, k: int) -> list[Distance]:
    measured = []
    for name, (policy, coefficients, space) in POLICIES.items():
        full = truncated.combine(texts.logprobs, coefficients, space).softmax(-1)
        found = served(chosen, texts, policy)
        off = truncated.total_variation(found, full)
        same = (found.argmax(-1) == full.argmax(-1)).double()
        p95 = float(torch.quantile(off, 0.95))
        measured.append(Distance(k, name, float(off.mean()), p95, float(off.max()), float(same.mean())))
    return measured


def measure_speeds(chosen: LocalDeployment, k: int, rounds: int) -> list[Speed]:
    measured = []
    for sequences in SEQUENCES:
        step_time(chosen, sequences)  # warms up
        before = cpu_times()
        times = [step_time(chosen, sequences) for _ in range(rounds)]
        measured.append(Speed(k, sequences, statistics.median(times), steal(before, cpu_times())))
    return measured


def step_time(chosen: LocalDeployment, sequences: int) -> float:
    """Median milliseconds between two tokens of a run of `sequences` together."""
    prompts = [
        [[257, 260, *b"Sum %d and %d." % (10 + number, 90 - number), 258, 261]] * 3 for number in range(sequences)
    ]
    requests = [greedy(prompt, Uniform(), TOKENS) for prompt in prompts]
    arrivals = chosen.generate(requests)[requests[0].id].arrivals
    return 1000 * statistics.median(later - sooner for sooner, later in itertools.pairwise(arrivals))


def write(distances: list[Distance], speeds: list[Speed], positions: int, prompts: int) -> None:
    REPORT.mkdir(exist_ok=True)
    about = {"positions": positions, "prompts": prompts, "vocabulary": demo.VOCABULARY, "cores": os.cpu_count()}
    data = {"about": about, "distances": list(map(asdict, distances)), "speeds": list(map(asdict, speeds))}
    (REPORT / "truncation.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (REPORT / "truncation.md").write_text(markdown(distances, speeds, about), encoding="utf-8")
    print(markdown(distances, speeds, about))


def markdown(distances: list[Distance], speeds: list[Speed], about: dict[str, int | None]) -> str:
    order = list(POLICIES)
    lines = [
        "# What truncated lists cost",
        "",
        "Total-variation distance between the distribution that the server reports and fusion over the full vocabulary",
        f"({about['vocabulary']} tokens), at the {about['positions']} positions of the right answers to "
        f"{about['prompts']} held-out prompts; three experts.",
        '"Same": positions at which the most probable token is the same.',
        "",
        "| policy | k | mean | 95th percentile | largest | same |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {one.policy} | {one.k} | {one.mean:.2e} | {one.p95:.2e} | {one.largest:.2e} | {one.agreement:.1%} |"
        for one in sorted(distances, key=lambda one: (order.index(one.policy), one.k))
    ]
    lines += [
        "",
        f"Milliseconds for each decoding step on {about['cores']} cores that three engines and the coordinator share;",
        "medians.",
        "",
        "| k | sequences | ms | steal |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [f"| {one.k} | {one.sequences} | {one.milliseconds:.1f} | {one.steal:.0%} |" for one in speeds]
    return "\n".join(lines) + "\n\nMade by `python -m tests.bench.truncation`.\n"
