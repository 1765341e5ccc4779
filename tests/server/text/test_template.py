"""Chat templates: the same text as transformers renders, and no special token that the client wrote."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from server.errors import BadRequest, StartError
from server.text.template import ChatTemplate, SpecialTokenEscaper
from server.text.tokenizer import Tokenizer
from tests.support.api.deployment import BOS, END, SPECIAL, STOP, TEMPLATE, USER, byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer().to_str())
TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
TALK = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": " Grüße \n"},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": {"ü": 1}}}]},
    {"role": "user", "content": "Why?"},
]
TEMPLATES = [
    TEMPLATE,
    "{% for m in messages %}\n  {% if m.role == 'user' %}{% continue %}{% endif %}\n{{ m.content|trim }}\n{% endfor %}",
    "{%- for m in messages -%}{% if loop.last %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{%- endfor -%}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools }}",
    "{{ messages[0].missing }}{{ messages | length }}{{ strftime_now('%Y') }}",
    "{{ messages[0]['content'].split('<')[0].upper() }}{% if tools is none %}no tools{% endif %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
def test_renders_as_transformers_does(source: str, prompted: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    arguments: dict[str, Any] = {"add_generation_prompt": prompted, "tools": None, "documents": None}
    [expected], _ = utils.render_jinja_template([TALK], chat_template=source, **arguments, **TOKENS)
    assert ChatTemplate(source, TOKENS, where="x").render(TALK, **arguments) == expected


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, where="x")
    with pytest.raises(BadRequest, match="roles must alternate"):
        template.render(TALK)


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}{{ 1 / 0 }}", "{{ 1 + 'a' }}"]
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(BadRequest):
        ChatTemplate(source, {}, where="x").render(TALK)


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(StartError, match=r"experts\.math: chat template"):
        ChatTemplate("{% if %}", {}, where="experts.math")


def test_no_text_becomes_a_special_token() -> None:
    dice = random.Random(3)
    for _ in range(300):
        words = [*SPECIAL, "<|", "|>", "end", " ", "\ufdd0", "\ufdd1", "0", "é"]
        content = "".join(dice.choices(words, k=dice.randrange(9)))
        escaper = SpecialTokenEscaper(TOKENIZER, max_marks=100)
        ids = escaper.encode(f"<|user|>{escaper.escape(content)}<|end|>")
        assert ids == [USER, *content.encode(), END]


@pytest.mark.parametrize("content", ["Hi", "Hi<|pad|>", "<|pad|>", "\ufdd0"])
def test_what_the_tokenizer_adds_it_adds_whatever_the_content(content: str) -> None:
    core = byte_tokenizer()
    core.post_processor = TemplateProcessing(
        single="<|bos|> $A <|stop|>", special_tokens=[("<|bos|>", BOS), ("<|stop|>", STOP)]
    )
    tokenizer = Tokenizer(core.to_str())
    escaper = SpecialTokenEscaper(tokenizer, max_marks=100)
    for added, before, after in ((True, [BOS], [STOP]), (False, [], [])):
        ids = escaper.encode(f"<|user|>{escaper.escape(content)}<|end|>", add_special_tokens=added)
        assert ids == [*before, USER, *content.encode(), END, *after]


def test_marks_of_another_request_are_text() -> None:
    forged = SpecialTokenEscaper(TOKENIZER, max_marks=100).escape("<|end|>")
    assert SpecialTokenEscaper(TOKENIZER, max_marks=100).encode(forged) == list(forged.encode())


def test_cutting_after_the_final_message() -> None:
    escaper = SpecialTokenEscaper(TOKENIZER, max_marks=100)
    assert escaper.cut(f"<|user|>a {escaper.tail}<|end|>") == "<|user|>a "
    assert escaper.cut(f"<|user|>{('a ' + escaper.tail).strip()}<|end|>") == "<|user|>a"
    with pytest.raises(BadRequest):
        escaper.cut("nothing")
