"""The whole experiment on the demo for one seed: `python -m deploy.demo.experiment --seed 0`.

Records, trains the gate families and the baselines, serves all of them, asks the held-out prompts, and fills the
folder --report: table.md and table.png, data-efficiency.md and .png, results.json with every answer, commands.txt,
times.json, versions.json. Every step is a command that a person could type. A finished step leaves a mark in the work
folder and is not run again; after an interruption the same call goes on. Nothing is chosen on the test prompts.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml

from deploy.demo import tables
from gate.options import Metavar, run_module, whole
from server.tools.provenance import versions

DEMO = Path("deploy/demo")
EXPERTS = ("math", "text", "chat")
START = "text"  # the expert from which FusionRoute's router is trained, as the paper starts from one of its experts
FAMILIES = {
    "gate, top-k only": ["--inputs", "topk"],
    "gate, hidden only": ["--inputs", "hidden"],
    "gate, both": ["--inputs", "topk,hidden"],
    "gate, both + state": ["--inputs", "topk,hidden", "--state-size", "16"],
    "gate, both + state + refinement": ["--inputs", "topk,hidden", "--state-size", "16"],
}
FULL = list(FAMILIES)[-1]
REFINEMENT_STEPS = 40
RESPONSES = (50, 200, 1000, 5000)
POLICIES = ("uniform", "uniform-prob", "product", "entropy", "confidence", "perplexity")
FUSIONROUTE = ["FusionRoute, its router alone", "FusionRoute, routing only", "FusionRoute"]
MERGING = ("linear", "task-arithmetic", "ties", "dare", "dare-ties")
NAME = "polylogit-demo"
ANSWER_TOKENS = "24"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentOptions:
    """Of `python -m deploy.demo.experiment`."""

    seed: int = 0
    """Of the prompts and of all training."""
    experts: Path = DEMO / "experts"
    """Folder of the three experts."""
    base: Path = DEMO / "base"
    """Their common start, for merging."""
    test: Annotated[int, whole(1)] = 200
    """Test prompts a domain."""
    work: Path | None = None
    """Folder of what is made on the way (default: build/experiment/seed-SEED)."""
    report: Path | None = None
    """Folder of the results (default: deploy/demo/report/seed-SEED)."""
    only: Annotated[tuple[str, ...], Metavar("STEP")] = ()
    """These steps, even if done (default: all that are not done)."""
    list: bool = False
    """Print the steps."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the experiment."""

    name: str
    """Unique."""
    run: Callable[[], None]
    """Calls commands through the experiment."""


class Experiment:
    """One seed's files and steps."""

    def __init__(self, options: ExperimentOptions) -> None:
        self.seed = options.seed
        self.experts = options.experts
        self.base = options.base
        self.test_prompts = options.test
        self.work = options.work or Path(f"build/experiment/seed-{options.seed}")
        self.report = options.report or DEMO / f"report/seed-{options.seed}"
        self.prompts = self.work / "prompts"
        self.results = self.work / "results"

    def steps(self) -> list[Step]:
        return [
            Step("prompts", self.make_prompts),
            Step("record", self.record),
            *(Step(f"train {name}", lambda name=name: self.train(name)) for name in FAMILIES),  # type: ignore[misc]
            *(Step(f"train {count} responses", lambda count=count: self.train_few(count)) for count in RESPONSES),  # type: ignore[misc]
            Step("remove inputs", self.remove_inputs),
            Step("merge", self.merge),
            Step("experts on training prompts", self.ask_experts),
            Step("fusionroute", self.fusionroute),
            Step("evaluate policies", self.evaluate_policies),
            *(Step(f"evaluate {label}", lambda label=label: self.evaluate_gate(label)) for label in self.gates()),  # type: ignore[misc]
            Step("evaluate merged", self.evaluate_merged),
            Step("evaluate fusionroute", self.evaluate_fusionroute),
            Step("route", self.route),
            Step("tables", self.write_tables),
        ]

    def run(self, only: Collection[str]) -> None:
        """Every step not done yet, or those named `only`, done or not. Raises SystemExit at a failed command."""
        self.results.mkdir(parents=True, exist_ok=True)
        (self.work / "done").mkdir(exist_ok=True)
        for step in self.steps():
            mark = self.work / "done" / _file(step.name)
            if step.name not in only if only else mark.exists():
                continue
            print(f"== {step.name}", flush=True)
            began = time.perf_counter()
            step.run()
            self._note_time(step.name, time.perf_counter() - began)
            mark.touch()

    def make_prompts(self) -> None:
        self.module(
            "deploy.demo.train.prompts", "--seed", self.seed, "--output", self.prompts, "--test", self.test_prompts
        )
        served = yaml.safe_load((DEMO / "polylogit.yaml").read_text())["policies"]
        models = {name: self.experts / name for name in EXPERTS}
        self.write_config("demo", models, {name: served[name] for name in POLICIES})

    def record(self) -> None:
        self.polylogit(
            "record", self.config("demo"), "--prompts", self.prompts / "train.jsonl", "--grader", "exact", "--answers",
            "--policies", ",".join((*EXPERTS, "uniform", "uniform-prob", "product")),
            "--max-tokens", ANSWER_TOKENS, "--seed", self.seed, "--output", self.work / "records",
        )  # fmt: skip

    def train(self, name: str) -> None:
        samples: list[object] = [
            "--prompts",
            self.prompts / "train.jsonl",
            "--grader",
            "exact",
            "--max-tokens",
            ANSWER_TOKENS,
        ]
        refined = ["--refine-steps", REFINEMENT_STEPS, *samples] if name.endswith("refinement") else []
        self._train(self.gate(name), [*FAMILIES[name], *refined])

    def train_few(self, count: int) -> None:
        self._train(self.gate(_few(count)), [*FAMILIES["gate, both"], "--responses", count])

    def _train(self, output: Path, settings: list[object]) -> None:
        records = ["--records", self.work / "records"]
        self.polylogit("train", self.config("demo"), *records, "--output", output, "--seed", self.seed, *settings)

    def remove_inputs(self) -> None:
        for removed in ("topk", "hidden", "state"):
            output = self.gate(_without(removed))
            self.module("gate.baselines.ablate", "--gate", self.gate(FULL), "--remove", removed, "--output", output)

    def merge(self) -> None:
        self.module(
            "gate.baselines.merge", "--base", self.base, "--experts", *(self.experts / name for name in EXPERTS),
            "--methods", *MERGING,
            "--tune", self.prompts / "validation.jsonl", "--limit", 200, "--seed", self.seed,
            "--output", self.work / "merged",
        )  # fmt: skip
        self.write_config("merged", {name: self.work / "merged" / name for name in MERGING}, {"uniform": {}})

    def ask_experts(self) -> None:
        self.evaluate("demo", "train.jsonl", "train-experts", {name: name for name in EXPERTS})

    def fusionroute(self) -> None:
        router = self.work / "router"
        self.module(
            "gate.baselines.fusionroute", "--experts", *(f"{name}={self.experts / name}" for name in EXPERTS),
            "--start", self.experts / START, "--prompts", self.prompts / "train.jsonl",
            "--validation", self.prompts / "validation.jsonl", "--preferences", self.results / "train-experts.json",
            "--seed", self.seed, "--output", router,
        )  # fmt: skip
        policies = {"fusionroute": {"router": "router"}, "routing-only": {"rule": "select", "by": "gate"}}
        models = {**{name: self.experts / name for name in EXPERTS}, "router": router}
        self.write_config("fusionroute", models, policies, gate=router / "gate.pt")

    def evaluate_policies(self) -> None:
        self.evaluate("demo", "test.jsonl", "policies", {name: name for name in (*EXPERTS, *POLICIES)})

    def evaluate_gate(self, label: str) -> None:
        self.evaluate("demo", "test.jsonl", _file(label), {"gate": label}, gate=self.gate(label))

    def evaluate_merged(self) -> None:
        self.evaluate("merged", "test.jsonl", "merged", {name: f"merged, {name}" for name in MERGING})

    def evaluate_fusionroute(self) -> None:
        rows = zip(("router", "routing-only", "fusionroute"), FUSIONROUTE, strict=True)
        self.evaluate("fusionroute", "test.jsonl", "fusionroute", dict(rows))

    def route(self) -> None:
        self.module(
            "gate.baselines.routing", "--models", *EXPERTS, "--results", self.results / "policies.json",
            "--prompts", self.prompts / "test.jsonl", "--train-results", self.results / "train-experts.json",
            "--train-prompts", self.prompts / "train.jsonl", "--output", self.results / "routing.json",
        )  # fmt: skip

    def write_tables(self) -> None:
        merged = [f"merged, {name}" for name in MERGING]
        baselines = [*EXPERTS, "oracle routing", "learned routing", *POLICIES, *merged]
        order = [*baselines, *FUSIONROUTE, *FAMILIES]
        order += [_without(removed) for removed in ("topk", "hidden", "state")]
        files = ["policies", "routing", "merged", "fusionroute", *(_file(label) for label in self.gates())]
        tables.write(
            [self.results / f"{name}.json" for name in files],
            self.report,
            order=order,
            gate=FULL,
            against=[baselines, FUSIONROUTE],
            efficiency={_few(count): count for count in RESPONSES},
        )
        for name in ("commands.txt", "times.json"):
            shutil.copy(self.work / name, self.report / name)
        (self.report / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")

    def gates(self) -> list[str]:
        """Labels of all gates: families, with an input removed, from few responses."""
        removed = [_without(name) for name in ("topk", "hidden", "state")]
        return [*FAMILIES, *removed, *(_few(count) for count in RESPONSES)]

    def gate(self, label: str) -> Path:
        return self.work / "gates" / f"{_file(label)}.pt"

    def config(self, name: str) -> Path:
        return self.work / f"{name}.yaml"

    def write_config(
        self, name: str, models: dict[str, Path], policies: dict[str, object], gate: Path | None = None
    ) -> None:
        """A deployment of these models; the gate of `demo` is given with each command."""
        data: dict[str, object] = {
            "name": NAME,
            "experts": [
                {"name": key, "model": str(path.resolve()), "dtype": "float32", "kv_cache_memory": "64MiB"}
                for key, path in models.items()
            ],
            "policies": policies,
            "default_policy": next(iter(policies)),
        }
        if gate is not None:
            data["gate"] = {"file": str(gate.resolve())}
        self.config(name).write_text(yaml.safe_dump(data, sort_keys=False))

    def evaluate(self, config: str, prompts: str, output: str, rows: dict[str, str], gate: Path | None = None) -> None:
        """Asks `NAME:model` for each model of `rows`, which the table calls by its value."""
        self.polylogit(
            "evaluate", self.config(config), *(["--gate", gate] if gate else []),
            "--prompts", self.prompts / prompts, "--grader", "exact", "--max-tokens", ANSWER_TOKENS,
            "--models", *(f"{NAME}:{model}={label}" for model, label in rows.items()),
            "--output", self.results / f"{output}.json",
        )  # fmt: skip

    def polylogit(self, *arguments: object) -> None:
        self.command("polylogit", [sys.executable, "-m", "server.cli", "--log-level", "warning"], arguments)

    def module(self, name: str, *arguments: object) -> None:
        self.command(f"python -m {name}", [sys.executable, "-m", name], arguments)

    def command(self, shown: str, program: list[str], arguments: tuple[object, ...]) -> None:
        words = [str(argument) for argument in arguments]
        line = f"{shown} {shlex.join(words)}"
        with (self.work / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        if code := subprocess.run([*program, *words], env=environment, check=False).returncode:
            raise SystemExit(f"ended with {code}: {line}")

    def _note_time(self, name: str, seconds: float) -> None:
        path = self.work / "times.json"
        times = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**times, name: round(seconds, 1)}, indent=1) + "\n")


def _few(count: int) -> str:
    return f"gate, both, {count} responses"


def _without(removed: str) -> str:
    return f"{FULL}, without {'top-k' if removed == 'topk' else removed}"


def _file(label: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in label)


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m deploy.demo.experiment", __doc__, ExperimentOptions, run, arguments)


def run(options: ExperimentOptions) -> None:
    """Run the command."""
    experiment = Experiment(options)
    if options.list:
        print("\n".join(step.name for step in experiment.steps()))
    else:
        experiment.run(options.only)


if __name__ == "__main__":
    main()
