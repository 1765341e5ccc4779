r"""Writes Llama models with random weights, to see how the cost of fusion shrinks beside larger models.

    python -m tests.bench.random_model build/bench --hidden 512 --layers 8

makes `build/bench/{a,b}` and `build/bench/bench.yaml`. They answer nonsense; only their speed is meant. The tokenizer
is the demo's.

    python -m tests.bench.random_model build/bench-152k --hidden 64 --layers 2 --vocabulary 151936 \
        --spread 4.5 --apart 0.4

makes a pair with the vocabulary of a large model, distributions of 4 nats or so with long tails, and two opinions that
are related, as those of experts of one base are.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gate.options import OptionsError, Positional, number, run_module, whole
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
    vocabulary: Annotated[int, whole(264)] = 264
    """Number of tokens. The tokenizer knows the first 264."""
    spread: Annotated[float, number(0)] = 0.0
    """Standard deviation of the logits; 0: whatever transformers' initial weights give."""
    apart: Annotated[float, number(0, 1)] = 1.0
    """How much of the second model's logits the first one's do not say; 1: they have nothing in common."""

    def __post_init__(self) -> None:
        if self.apart < 1 and not self.spread:
            raise OptionsError("--apart needs a --spread: without one a model reads and says by the same matrix")


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m tests.bench.random_model", __doc__, RandomModelOptions, run, arguments)


def run(options: RandomModelOptions) -> None:
    """Run the command."""
    first = new_model(options, seed=0)
    second = new_model(options, seed=1)
    if options.apart < 1:
        approach(second, first, options.apart)
    for name, model in {"a": first, "b": second}.items():
        write(model, options.folder / name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{options.folder / name}: {parameters / 1e6:.1f} million parameters")
    (options.folder / "bench.yaml").write_text(
        "name: bench\nexperts:\n"
        "  - {name: a, model: a, dtype: float32, kv_cache_memory: 512MiB}\n"
        "  - {name: b, model: b, dtype: float32, kv_cache_memory: 512MiB}\n",
        encoding="utf-8",
    )


def new_model(options: RandomModelOptions, seed: int) -> LlamaForCausalLM:
    """One model; with a `spread` its output matrix is its own, else that of the embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=not options.spread,
    )
    model = LlamaForCausalLM(config)
    if options.spread:
        # What enters it has H entries of mean square 1.
        torch.nn.init.normal_(model.lm_head.weight, std=options.spread / options.hidden**0.5)
    return model


@torch.no_grad()
def approach(model: LlamaForCausalLM, other: LlamaForCausalLM, apart: float) -> None:
    """Make `model` read as `other` does, and say the same but for a part, at unchanged spread."""
    own = model.lm_head.weight.clone()
    model.load_state_dict(other.state_dict())
    model.lm_head.weight.copy_((1 - apart**2) ** 0.5 * other.lm_head.weight + apart * own)


def write(model: LlamaForCausalLM, folder: Path) -> None:
    """Write one model with the tokenizer."""
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(MODEL / file, folder / file)


if __name__ == "__main__":
    main()
