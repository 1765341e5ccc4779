"""The demo's tokenizer, tasks, prompt files and shipped gate."""

import json
import random

import pytest
from transformers import AutoTokenizer

from deploy.demo.train import experts, tasks, tokenizer
from gate import checkpoint
from gate.contract import mismatches, vocabulary_hash
from tests.support.paths import ROOT

DEMO = ROOT / "deploy/demo"
PROMPTS = DEMO / "prompts"
NAMES = ("math", "text", "chat")


@pytest.fixture(scope="module")
def demo_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "Add 1 and 2.", "héllo 🙂", " \n\t x  ", "漢字\u0000\u202e", "a<b>|"])
def test_tokenizer_round_trips_unicode(demo_tokenizer, text):
    ids = demo_tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    assert demo_tokenizer.decode(ids) == text


def test_template_renders_what_the_experts_were_trained_on(demo_tokenizer):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi é"}]
    text = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>Hi é<|end|><|assistant|>"
    assert demo_tokenizer.encode(text, add_special_tokens=False) == experts.prompt_tokens("Hi é", "Be brief.")


def test_template_takes_parts_tools_and_continuation(demo_tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "85, e"},
    ]
    text = demo_tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text == "<|bos|><|user|>ab<|end|><|assistant|><|end|><|tool|>7<|end|><|assistant|>85, e"


def test_answers_by_skill():
    parts = (tasks.Part("math", "85", "27"), tasks.Part("text", "enots", "stone"))
    example = tasks.Example("mixed", "Add 27 and 58, then reverse stone.", parts)
    assert example.answer() == "85, enots"
    assert example.answer(frozenset({"math"})) == "85, stone"
    assert example.answer(frozenset({"text"})) == "27, enots"


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_examples_stay_on_their_side_and_differ_from_the_guess(domain):
    drawn = {test: [tasks.MAKERS[domain](random.Random(seed), test) for seed in range(300)] for test in (False, True)}
    assert not {e.prompt for e in drawn[False]} & {e.prompt for e in drawn[True]}
    assert all(part.right != part.naive for e in drawn[True] for part in e.parts)
    assert all(len(e.prompt) <= 60 and len(e.answer()) <= 17 for e in drawn[False] + drawn[True])


def test_split_is_by_content_not_by_phrasing():
    assert tasks.pair_key(27, 58) == tasks.pair_key(58, 27)
    rng = random.Random(0)
    train = {tasks.pair_key(*tasks.numbers(rng, False)) for _ in range(2000)}
    test = {tasks.pair_key(*tasks.numbers(rng, True)) for _ in range(2000)}
    assert not train & test
    assert not {tasks.word(rng, False) for _ in range(2000)} & {tasks.word(rng, True) for _ in range(2000)}


def test_shipped_prompt_files_are_disjoint():
    def users(name):
        rows = [json.loads(line) for line in (PROMPTS / name).read_text(encoding="utf-8").splitlines()]
        return {row["messages"][-1]["content"] for row in rows}

    train, validation, test = users("train.jsonl"), users("validation.jsonl"), users("test.jsonl")
    assert len(test) == 400
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_shipped_gate_fits_the_shipped_experts():
    contract = checkpoint.load(DEMO / "gate.pt").contract
    for name in NAMES:
        found = vocabulary_hash(DEMO / "experts" / name / "tokenizer.json")
        deployment = {"experts": list(NAMES), "vocabulary_hash": found, "vocabulary_size": 264}
        assert mismatches(contract, **deployment, hidden_sizes=[128] * 3) == []
