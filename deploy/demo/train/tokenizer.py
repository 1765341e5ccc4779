"""Builds the demo tokenizer: 256 bytes, seven special tokens and one reserved slot.

Token id n < 256 is the byte n, so any Unicode text round-trips and training can encode with
``str.encode`` alone. Knows the chat template; knows nothing of tasks or models.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|reserved_0|>",
)
PAD, BOS, END, SYSTEM, USER, ASSISTANT, TOOL = range(256, 263)
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if tools -%}"
    "{{- '<|system|>Functions:\\n' -}}"
    "{%- for tool in tools -%}{{- tool['function'] | tojson -}}{{- '\\n' -}}{%- endfor -%}"
    """{{- 'Call one: <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' -}}"""
    "{{- eos_token -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if role not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('unknown role: ' ~ role) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ role ~ '|>' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- if message['content'] or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    """{{- '<tool_call>\\n{"name": "' ~ call['function']['name'] ~ '", "arguments": ' -}}"""
    "{%- set arguments = call['function']['arguments'] -%}"
    "{{- arguments if arguments is string else arguments | tojson -}}"
    "{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE uses for each byte 0..255 (the GPT-2 mapping)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + rank) for rank, byte in enumerate(others)})
    return [symbols[byte] for byte in range(256)]


def build() -> Tokenizer:
    """Byte-level BPE without merges; it adds no special token of its own to a text."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return core


def settings() -> dict[str, object]:
    """tokenizer_config.json, with the names that both transformers 4 and 5 read."""
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in named.values()],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }


def save(folder: Path) -> None:
    """Writes tokenizer and generation settings into a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    generation = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
    for name, content in {"tokenizer_config": settings(), "generation_config": generation}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
