"""What a model directory says without its weights, and what is said of a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import StartError
from server.text.model_files import read_model_files
from tests.support.api.deployment import CONTEXT, END, STOP, TEMPLATE, VOCABULARY, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_facts(model: Path) -> None:
    files = read_model_files(model)
    assert (files.vocab_size, files.max_positions, files.hidden_size) == (VOCABULARY, CONTEXT, 8)
    assert files.architectures == ("LlamaForCausalLM",)
    assert files.eos_token_ids == (END,)
    assert files.chat_template == TEMPLATE
    assert files.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|end|>"}


def test_end_tokens_of_all_files(model: Path) -> None:
    edit(model / "generation_config.json", eos_token_id=[1, END])
    edit(model / "config.json", eos_token_id=2)
    edit(model / "tokenizer_config.json", eos_token={"content": "<|stop|>"})
    assert read_model_files(model).eos_token_ids == (1, 2, END, STOP)


def test_optional_files(model: Path) -> None:
    (model / "generation_config.json").unlink()
    (model / "tokenizer_config.json").unlink()
    files = read_model_files(model)
    assert files.eos_token_ids == (END,) and files.chat_template is None and files.special_tokens == {}


def test_a_template_file_wins(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert read_model_files(model).chat_template == "{{ messages }}"


def test_named_templates(model: Path) -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    edit(model / "tokenizer_config.json", chat_template=named)
    assert read_model_files(model).chat_template == "b"


def test_a_model_with_a_text_part(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": config}))
    assert read_model_files(model).vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("model.safetensors", None, "has no weights"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "must be a JSON object"),
        ("config.json", "{}", "vocab_size is missing"),
        ("config.json", '{"vocab_size": 5}', "max_position_embeddings is missing"),
        ("generation_config.json", "x", "not valid JSON"),
    ],
)
def test_one_clear_line(model: Path, file: str, content: str | None, message: str) -> None:
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)
    with pytest.raises(StartError, match=message) as error:
        read_model_files(model)
    assert "\n" not in str(error.value) and str(model) in str(error.value)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such model directory"):
        read_model_files(tmp_path / "nothing")
