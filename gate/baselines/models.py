"""Transformers models: loaded from and written to directories, and what one says at some positions of texts that it
reads at once (teacher forcing).

B texts of T tokens, N positions in all, V vocabulary, H hidden size. Knows nothing of gates.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gate.errors import GateError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
)


class ModelError(GateError):
    """There is no model that can be used."""


def load_model(folder: Path) -> Any:
    """A transformers model in float32. Raises ModelError if there is none."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no model that can be loaded: {str(error).strip().splitlines()[0]}") from None


def save_model(model: Any, like: Path, folder: Path) -> None:
    """Writes a model directory, with the type of weights and the tokenizer of the model at `like`."""
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"  # the latter before transformers 5
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (like / name).is_file():
            shutil.copy(like / name, folder / name)


def logits_at(model: Any, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(logits [N, V] of the token after each `chosen` one, bool [B, T], of `ids` [B, T]; what enters the output layer
    there [N, H]).

    The logits are the model's own: some change what their output layer gives (Gemma's soft cap, Granite's and Cohere's
    scale). Other positions are left out before that layer: theirs would take B T V floats.
    """
    entered: list[Tensor] = []

    def select(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        entered.append(inputs[0][chosen])
        return entered[0].unsqueeze(0)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        logits: Tensor = model(ids, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits, entered[0]
