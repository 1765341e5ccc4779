"""Writes Llama models with random weights, to see how the cost of fusion shrinks beside larger models.

    python -m tests.bench.random_model build/bench --hidden 512 --layers 8

makes `build/bench/{a,b}` and `build/bench/bench.yaml`. They answer nonsense; only their speed is meant. The tokenizer
is the demo's.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gate.options import Positional, run_module, whole
from tests.support.paths import DEMO

MODEL = DEMO / "experts" / "math"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModelOptions:
    """Of this script."""

    folder: Annotated[Path, Positional("FOLDER")]
    """The models and a configuration go into this."""
    hidden: Annotated[int, whole(32)] = 512
    """Hidden size, a multiple of 32."""
    layers: Annotated[int, whole(1)] = 8
    """Number of layers."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m tests.bench.random_model", __doc__, RandomModelOptions, run, arguments)


def run(options: RandomModelOptions) -> None:
    """Run the command."""
    for seed, name in enumerate("ab"):
        parameters = write(options.folder / name, options.hidden, options.layers, seed)
        print(f"{options.folder / name}: {parameters / 1e6:.1f} million parameters")
    (options.folder / "bench.yaml").write_text(
        "name: bench\nexperts:\n"
        "  - {name: a, model: a, dtype: float32, kv_cache_memory: 512MiB}\n"
        "  - {name: b, model: b, dtype: float32, kv_cache_memory: 512MiB}\n",
        encoding="utf-8",
    )


def write(folder: Path, hidden: int, layers: int, seed: int) -> int:
    """Write one model; how many parameters it has."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(MODEL / file, folder / file)
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
