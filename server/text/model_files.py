"""Facts of a Hugging Face model directory that can be known without loading its weights: vocabulary, context
length, end tokens, chat template. Knows nothing of torch, engines or tokenizer internals.

Every fault is a `StartError` of one line that names the directory or the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gate.files import sha256_parts
from server.errors import StartError

_WEIGHTS = ("*.safetensors", "*.bin")
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "model_max_length",
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The facts of one model directory."""

    path: Path
    """The directory."""
    tokenizer_path: Path
    """Its tokenizer.json."""
    vocab_size: int
    """Token ids are below it."""
    max_positions: int
    """The longest context, in tokens."""
    hidden_size: int
    """Of a hidden state."""
    architectures: tuple[str, ...]
    """As config.json names them."""
    eos_token_ids: tuple[int, ...]
    """Ascending; of generation_config.json, config.json and tokenizer_config.json together."""
    chat_template: str | None
    """Jinja source."""
    special_tokens: Mapping[str, str]
    """Names such as bos_token -> text, as chat templates use them."""


def read_model_files(path: Path, *, weights: bool = True) -> ModelFiles:
    """The facts of the model in directory `path`, which must have `weights` too. Raises StartError with one line."""
    if not path.is_dir():
        raise StartError(f"{path}: no such model directory")
    config = _read_json(path / "config.json")
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    facts: dict[str, Any] = {**config, **(text_config or {})}
    tokenizer = _read_json(path / "tokenizer.json")
    if weights and not weight_files(path):
        raise StartError(f"{path}: has no weights ({' or '.join(_WEIGHTS)})")
    generation = _read_json(path / "generation_config.json", required=False)
    tokenizer_config = _read_json(path / "tokenizer_config.json", required=False)
    special = _special_tokens(tokenizer_config)
    ids = _added_ids(tokenizer)
    return ModelFiles(
        path=path,
        tokenizer_path=path / "tokenizer.json",
        vocab_size=_integer(path, facts, "vocab_size"),
        max_positions=_integer(path, facts, *_POSITIONS),
        hidden_size=_integer(path, facts, "hidden_size", "n_embd", "d_model"),
        architectures=tuple(config.get("architectures") or ()),
        eos_token_ids=_eos_ids(generation, facts, ids.get(special.get("eos_token", ""))),
        chat_template=_chat_template(path, tokenizer_config),
        special_tokens=special,
    )


def fingerprint(files: ModelFiles, more: object) -> str:
    """sha256 (hexadecimal) that changes with the model: its configuration, tokenizer and chat template, its weights
    (`weights_sha256`), and `more` (JSON)."""
    texts = [json.dumps([files.chat_template, more]).encode()]
    texts += [path.read_bytes() for path in (files.path / "config.json", files.tokenizer_path)]
    return sha256_parts([*texts, weights_sha256(weight_files(files.path)).encode()])


def weights_sha256(files: list[Path]) -> str:
    """sha256 (hexadecimal) over the names, the sizes and samples from all over the contents of files of weights: to
    read all of large ones would take minutes, and their ends alone are often what fine-tuning leaves as it was."""
    parts = []
    for path in files:
        size = path.stat().st_size
        parts += [path.name.encode(), str(size).encode()]
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                parts.append(file.read(_SAMPLE_BYTES))
    return sha256_parts(parts)


def weight_files(path: Path) -> list[Path]:
    """The files in directory `path` that hold weights, by name."""
    return sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise StartError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise StartError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise StartError(f"{path}: not valid JSON") from None
    if not isinstance(data, dict):
        raise StartError(f"{path}: must be a JSON object")
    return data


def _integer(path: Path, facts: Mapping[str, Any], *names: str) -> int:
    """The first of `names` that is a positive integer."""
    for name in names:
        value = facts.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise StartError(f"{path / 'config.json'}: {names[0]} is missing or not a positive integer")


def _ids(values: Iterable[Any]) -> list[int]:
    """Every integer among `values` and the lists among them."""
    items = (item for value in values for item in (value if isinstance(value, list) else [value]))
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _eos_ids(generation: Mapping[str, Any], facts: Mapping[str, Any], named: int | None) -> tuple[int, ...]:
    return tuple(sorted(set(_ids([generation.get("eos_token_id"), facts.get("eos_token_id"), named]))))


def _added_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Text of an added token -> id."""
    return {
        token["content"]: token["id"]
        for token in tokenizer.get("added_tokens") or []
        if isinstance(token, dict) and "content" in token and "id" in token
    }


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... -> text. Older files hold an object with the text in `content`."""
    special: dict[str, str] = {}
    for name, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            special[name] = text
    return special


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
