"""A model directory without a model, and a deployment of two experts over it: bytes are tokens, eight ids are
special."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.config import Config, parse_config

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|stop|>"]
PAD, BOS, END, SYSTEM, USER, ASSISTANT, TOOL, STOP = range(256, 264)
VOCABULARY = 264
CONTEXT = 512

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}{{ '<|' ~ message.role ~ '|>' ~ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
)


def byte_symbols() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {b: chr(256 + rank) for rank, b in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    core = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return core


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 8,
            "max_position_embeddings": CONTEXT,
            "eos_token_id": END,
            "bos_token_id": BOS,
        },
        "generation_config.json": {"eos_token_id": [END]},
        "tokenizer_config.json": {"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def deployment(folder: Path, **changes: Any) -> Config:
    """Experts `math` and `text`, under the name `duo`; `text` has a system prompt of its own."""
    if not (folder / "model").exists():
        write_model(folder / "model")
    data: dict[str, Any] = {
        "name": "duo",
        "experts": [
            {"name": "math", "model": "model"},
            {"name": "text", "model": "model", "system_prompt": "Be brief."},
        ],
        "policies": {"uniform": {}, "product": {}},
        "http": {"keepalive_seconds": 0.3, "write_seconds": 1.0},
    }
    return parse_config(data | changes, directory=folder)


def ids(text: str) -> list[int]:
    """Text -> token ids, special tokens parsed."""
    return byte_tokenizer().encode(text, add_special_tokens=False).ids
