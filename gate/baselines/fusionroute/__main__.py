"""`python -m gate.baselines.fusionroute`: from experts, prompts with answers and an evaluation to a router.

Supervised fine-tuning needs a reference answer to every training prompt; that is FusionRoute's own requirement, where a
gate needs only to be told which responses were right.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from gate.baselines.fusionroute.data import Encoder, preferences, references
from gate.baselines.fusionroute.export import export
from gate.baselines.fusionroute.train import RouterModel, Settings, fit_preferences, fit_references
from gate.baselines.merge import load, save
from gate.errors import one_line

VALIDATION = 400


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m gate.baselines.fusionroute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--experts", nargs="+", required=True, metavar="NAME=FOLDER", help="in the deployment's order")
    parser.add_argument("--start", type=Path, required=True, help="the model from which the router is trained")
    parser.add_argument("--name", default="router", help="the router's name, after the experts in the deployment")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with messages and answer")
    parser.add_argument("--validation", type=Path, required=True, help="the same, for choosing the epoch")
    parser.add_argument("--preferences", type=Path, help="answers to --prompts, written by polylogit evaluate")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=1000, help="preferences to learn from (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first of --prompts, answered or preferred")
    parser.add_argument("--top-k", type=int, default=32, help="of the deployment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, required=True, help="model directory of the router; its gate is gate.pt there"
    )
    arguments = parser.parse_args()
    pairs = [argument.partition("=") for argument in arguments.experts]
    if not all(name and folder for name, _, folder in pairs):
        parser.error("experts are given as NAME=FOLDER")
    with one_line(parser):
        _run(arguments, {name: Path(folder) for name, _, folder in pairs})


def _run(arguments: argparse.Namespace, folders: dict[str, Path]) -> None:
    began = time.perf_counter()
    torch.manual_seed(arguments.seed)
    validation = references(arguments.validation, VALIDATION)
    training = references(arguments.prompts, arguments.limit)
    rng = random.Random(arguments.seed)
    graded = (
        preferences(arguments.prompts, arguments.preferences, rng, arguments.limit) if arguments.preferences else []
    )
    model, experts = load(arguments.start), [load(folder) for folder in folders.values()]
    tokenizer = AutoTokenizer.from_pretrained(arguments.start, local_files_only=True)
    router = RouterModel(model, experts, Encoder(tokenizer), "cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(epochs=arguments.epochs)
    fit_references(router, training, validation, settings, arguments.seed)
    if graded:
        graded = rng.sample(graded, min(arguments.pairs, len(graded)))
        fit_preferences(router, graded, validation, settings, arguments.seed)
    save(router.model.cpu(), arguments.start, arguments.output)
    sizes = [expert.config.hidden_size for expert in (*router.experts, router.model)]
    file = arguments.output / "gate.pt"
    export(router.head, list(folders), arguments.name, sizes, arguments.start / "tokenizer.json", arguments.top_k, file)
    print(f"{time.perf_counter() - began:.0f} s -> {arguments.output}")


if __name__ == "__main__":
    main()
