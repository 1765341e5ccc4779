"""`python -m gate.baselines.fusionroute`: from experts, prompts with answers and an evaluation to a router.

Supervised fine-tuning needs a reference answer to every training prompt; that is FusionRoute's own requirement, where a
gate needs only to be told which responses were right.
"""

import random
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from transformers import AutoTokenizer

from gate.baselines.fusionroute.data import Encoder, preferences, references
from gate.baselines.fusionroute.export import export
from gate.baselines.fusionroute.train import RouterModel, Settings, fit_preferences, fit_references
from gate.baselines.models import load_model, save_model
from gate.options import Each, Metavar, Output, run_module, whole

VALIDATION = 400


def expert(text: str) -> tuple[str, Path]:
    """Parses NAME=FOLDER."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ArgumentTypeError("experts are given as NAME=FOLDER")
    return name, Path(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionRouteOptions:
    """Of `python -m gate.baselines.fusionroute`."""

    experts: Annotated[tuple[tuple[str, Path], ...], Each(expert), Metavar("NAME=FOLDER")]
    """In the deployment's order."""
    start: Path
    """The model from which the router is trained."""
    name: str = "router"
    """The router's name, after the experts in the deployment."""
    prompts: Path
    """JSON lines with messages and answer."""
    validation: Path
    """The same, for choosing the epoch."""
    preferences: Path | None = None
    """Answers to --prompts, written by polylogit evaluate (default: none, then no preference phase)."""
    epochs: Annotated[int, whole(1)] = 2
    """Of the reference phase."""
    pairs: Annotated[int, whole(0)] = 1000
    """Preferences to learn from."""
    limit: Annotated[int | None, whole(1)] = None
    """Only the first of --prompts, answered or preferred (default: all)."""
    seed: int = 0
    """Of all that is random."""
    output: Annotated[Path, Output(folder=True)]
    """Model directory of the router; its gate is gate.pt there."""


def fusionroute(options: FusionRouteOptions) -> None:
    """Run the command. Raises GateError."""
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    names, folders = [name for name, _ in options.experts], [folder for _, folder in options.experts]
    validation = references(options.validation, VALIDATION)
    training = references(options.prompts, options.limit)
    rng = random.Random(options.seed)
    graded = preferences(options.prompts, options.preferences, rng, options.limit) if options.preferences else []
    model, experts = load_model(options.start), [load_model(folder) for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(options.start, local_files_only=True)
    router = RouterModel(model, experts, Encoder(tokenizer), "cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(epochs=options.epochs)
    fit_references(router, training, validation, settings, options.seed)
    if graded:
        graded = rng.sample(graded, min(options.pairs, len(graded)))
        fit_preferences(router, graded, validation, settings, options.seed)
    save_model(router.model.cpu(), options.start, options.output)
    sizes = [expert.config.hidden_size for expert in (*router.experts, router.model)]
    file = options.output / "gate.pt"
    export(router.head, names, options.name, sizes, options.start / "tokenizer.json", file)
    print(f"{time.perf_counter() - began:.0f} s -> {options.output}")


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m gate.baselines.fusionroute", __doc__, FusionRouteOptions, fusionroute, arguments)


if __name__ == "__main__":
    main()
