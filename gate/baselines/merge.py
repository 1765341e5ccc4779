"""Merged parameters: one model from several of one architecture, `python -m gate.baselines.merge`.

tau_i = expert_i - base is expert i's task vector. Works tensor by tensor (trimming too, as mergekit does), in float32.

| method | result | source |
| --- | --- | --- |
| linear | mean of the experts | Wortsman et al. 2022, arXiv 2203.05482 |
| task-arithmetic | base + scale * sum tau_i | Ilharco et al. 2023, arXiv 2212.04089 |
| ties | base + scale * mean, over the tau_i of the elected sign, of the largest `density` of each | arXiv 2306.01708 |
| dare | task arithmetic of tau_i with entries kept with chance `density` and divided by it | arXiv 2311.03099 |
| dare-ties | ties of such tau_i, not trimmed | both |

`--tune` chooses scale and density by greedy accuracy on a file of prompts, which must not be the test's; of equals,
those under which the right answers are most probable. Knows nothing of serving: it writes ordinary model directories.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from gate.baselines.greedy import Greedy
from gate.baselines.models import load_model, save_model
from gate.errors import GateError
from gate.options import Metavar, Output, run_module, whole

State = dict[str, Tensor]
Method = Literal["linear", "task-arithmetic", "ties", "dare", "dare-ties"]
METHODS: tuple[Method, ...] = get_args(Method)
SCALES = (0.3, 0.5, 0.7, 1.0, 1.3)
DENSITIES = (0.2, 0.5)


class MergeError(GateError):
    """The models cannot be merged."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method and its settings; those that it does not use are left at their values here."""

    method: str
    """One of `METHODS`."""
    scale: float = 1.0
    """Of what is added to the base."""
    density: float = 1.0
    """Share of each task vector's entries that are kept."""
    seed: int = 0
    """Of the entries that DARE drops."""


def merge(recipe: Recipe, base: State | None, experts: list[State]) -> State:
    """The merged parameters. Raises MergeError without a base for a method that needs one."""
    if recipe.method == "linear":
        return {name: torch.stack([expert[name] for expert in experts]).mean(0) for name in experts[0]}
    if base is None:
        raise MergeError(f"{recipe.method} needs the model from which the experts were fine-tuned")
    generator = torch.Generator().manual_seed(recipe.seed)
    return {
        name: start + recipe.scale * _step(recipe, torch.stack([e[name] for e in experts]) - start, generator)
        for name, start in base.items()
    }


def trim(task: Tensor, density: float) -> Tensor:
    """The `density` of entries that are largest in magnitude; the others 0. [...] -> [...]"""
    kept = max(1, round(density * task.numel()))
    order = task.abs().flatten().argsort(descending=True, stable=True)[:kept]
    mask = torch.zeros(task.numel(), dtype=torch.bool)
    mask[order] = True
    return task * mask.view(task.shape)


def elect(tasks: Tensor) -> Tensor:
    """[E, ...] -> [...]: per entry the sign of the sum, then the mean of the non-zero values of that sign."""
    agreed = (tasks.sign() == tasks.sum(0).sign()) & (tasks != 0)
    return (tasks * agreed).sum(0) / agreed.sum(0).clamp_min(1)


def drop(tasks: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with chance `density` and divided by it, so that its expectation stays."""
    kept = torch.rand(tasks.shape, generator=generator) < density
    return tasks * kept / density


def _step(recipe: Recipe, tasks: Tensor, generator: torch.Generator) -> Tensor:
    """[E, ...] task vectors -> [...], before the scale."""
    match recipe.method:
        case "task-arithmetic":
            return tasks.sum(0)
        case "ties":
            return elect(torch.stack([trim(task, recipe.density) for task in tasks]))
        case "dare":
            return drop(tasks, recipe.density, generator).sum(0)
        case "dare-ties":
            return elect(drop(tasks, recipe.density, generator))
    raise MergeError(f"unknown method {recipe.method!r}; known: {', '.join(METHODS)}")


def distance(one: State, other: State) -> float:
    """Euclidean, over all parameters."""
    return float(sum((one[name] - other[name]).square().sum() for name in one) ** 0.5)


def check_models(base: State | None, experts: dict[str, State]) -> dict[str, float]:
    """Each expert's distance from the base. Raises MergeError for another architecture, or a base from which the
    experts were not fine-tuned.

    Fine-tuned models lie nearer to their start than to each other; a model that is farther from an expert than another
    expert is did not start it.
    """
    first, *others = experts
    for name, state in {**experts, **({"the base": base} if base else {})}.items():
        if {key: value.shape for key, value in state.items()} != {k: v.shape for k, v in experts[first].items()}:
            raise MergeError(f"{name} and {first} differ in their parameters' names or shapes")
    if base is None:
        return {}
    distances = {name: distance(state, base) for name, state in experts.items()}
    for one, other in itertools.combinations([first, *others], 2):
        apart = distance(experts[one], experts[other])
        if max(distances[one], distances[other]) >= apart:
            raise MergeError(
                f"the base is not where these experts started: {one} and {other} are {apart:.1f} apart, "
                f"and {distances[one]:.1f} and {distances[other]:.1f} from it"
            )
    return distances


def recipes(method: str, seed: int) -> Iterator[Recipe]:
    """What `--tune` tries."""
    if method == "linear":
        yield Recipe(method)
    elif method == "task-arithmetic":
        yield from (Recipe(method, scale) for scale in SCALES)
    else:
        yield from (Recipe(method, scale, density, seed) for scale in SCALES for density in DENSITIES)


def tune(
    method: str, base: State | None, experts: list[State], greedy: Greedy, seed: int
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with the highest accuracy on the prompts of `greedy`, and all that was tried."""
    tried: list[dict[str, Any]] = []
    for recipe in recipes(method, seed):
        greedy.model.load_state_dict(merge(recipe, base, experts))
        tried.append({**asdict(recipe), "accuracy": greedy.accuracy(), "answer_logprob": greedy.answer_logprob()})
        print(", ".join(f"{key} {value}" for key, value in tried[-1].items()), flush=True)
    best = max(range(len(tried)), key=lambda index: (tried[index]["accuracy"], tried[index]["answer_logprob"]))
    return list(recipes(method, seed))[best], tried


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Of `python -m gate.baselines.merge`."""

    base: Path | None = None
    """The model from which the experts were fine-tuned (default: none, then only linear)."""
    experts: Annotated[tuple[Path, ...], Metavar("FOLDER")]
    """The models to merge."""
    methods: tuple[Method, ...] = METHODS
    """A model for each of these."""
    tune: Annotated[Path | None, Metavar("PROMPTS")] = None
    """Choose scale and density on these prompts (default: --scale and --density)."""
    limit: Annotated[int | None, whole(1)] = None
    """Every nth of these prompts, so that there are this many (default: all)."""
    scale: float = 1.0
    """Without --tune."""
    density: float = 0.5
    """Without --tune."""
    seed: int = 0
    """Of what dare drops."""
    output: Annotated[Path, Output(folder=True)]
    """A model directory for each method goes into this."""


def write_merged(options: MergeOptions) -> None:
    """Run the command. Raises GateError."""
    experts = {str(folder): load_model(folder).state_dict() for folder in options.experts}
    base = load_model(options.base).state_dict() if options.base else None
    notes: dict[str, Any] = {"distances from the base": check_models(base, experts)}
    first = options.experts[0]
    for method in options.methods:
        model = load_model(first)
        recipe = Recipe(method, options.scale, options.density, options.seed)
        if options.tune:
            greedy = Greedy(model, first, options.tune, options.limit)
            recipe, notes[method] = tune(method, base, list(experts.values()), greedy, options.seed)
        model.load_state_dict(merge(recipe, base, list(experts.values())))
        save_model(model, first, options.output / method)
        print(f"{recipe} -> {options.output / method}", flush=True)
    (options.output / "merge.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m gate.baselines.merge", __doc__, MergeOptions, write_merged, arguments)


if __name__ == "__main__":
    main()
