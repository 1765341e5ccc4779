"""The demo's tokenizer, tasks and prompt files, and the recording loop on small random experts."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deploy.demo.train import experts, tasks, tokenizer
from gate import checkpoint
from gate.contract import mismatches, vocabulary_hash
from gate.ensemble import Ensemble, constant_policy, gate_policy, roll_out
from gate.model import GateModel
from gate.record import Prompt, fixed_policies, record_batch, responses
from gate.refine import Refinement, refine
from gate.train import make_contract
from tests.gate.examples import ROOT

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

    train, test = users("train.jsonl"), users("test.jsonl")
    assert len(test) == 400
    assert not train & test


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    folders = {}
    for seed, name in enumerate(("math", "text")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=tokenizer.VOCABULARY_SIZE,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
        folders[name] = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folders[name])
        tokenizer.save(folders[name])
    return Ensemble(folders, top_k=16)


def prompts(ensemble):
    texts = ["Hi", "Add 27 and 58, then reverse stone."]
    return [
        Prompt(number, "mixed", ensemble.encode([{"role": "user", "content": text}]), "85")
        for number, text in enumerate(texts)
    ]


def test_cached_rollout_equals_teacher_forcing_and_hidden_gives_the_logits(ensemble):
    """Left padding, KV cache and fork against one plain forward pass per row."""
    asked = prompts(ensemble)
    generator = torch.Generator().manual_seed(0)
    cursor = ensemble.prefill([prompt.tokens for prompt in asked]).fork(1)
    policy = constant_policy("uniform", "prob", [0.5, 0.5])
    rollout = roll_out(ensemble, cursor, policy, temperature=1.0, max_tokens=5, generator=generator)
    for row, prompt in enumerate(asked):
        length = int(rollout.lengths[row])
        response = rollout.tokens[row, :length].tolist()
        scored = ensemble.score([prompt.tokens], [response])
        model = ensemble.models[1]
        logits = model(torch.tensor([prompt.tokens + response])).logits[0].detach()
        for step in range(length):
            full = logits[len(prompt.tokens) - 1 + step].log_softmax(-1)
            for views in (rollout.views, scored.views):
                at = row if views is rollout.views else 0
                listed = full[views[step].topk_ids[at, 1]]
                torch.testing.assert_close(views[step].topk_logprobs[at, 1], listed, atol=1e-4, rtol=1e-4)
                again = model.lm_head(views[step].hidden[1][at]).log_softmax(-1).detach()
                torch.testing.assert_close(again, full, atol=1e-4, rtol=1e-4)


def test_record_batch_rewards_only_the_reference(ensemble):
    asked = prompts(ensemble)
    made = record_batch(
        ensemble,
        asked,
        fixed_policies(ensemble.names),
        temperature=1.0,
        max_tokens=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert int(made.lengths.sum()) == len(made.tokens) == len(made.hidden[0])
    rewarded = [source for source, reward in zip(made.sources, made.rewards.tolist(), strict=True) if reward]
    assert rewarded == ["reference", "reference"]
    assert made.tokens[-3:].tolist() == [*b"85", ensemble.end]


def test_refinement_runs_and_ignores_groups_without_a_difference(ensemble):
    """Random experts never answer right, so every group ties and the gate must stay as it was."""
    agreed = make_contract(
        ensemble,
        DEMO / "experts/math/tokenizer.json",
        space="logprob",
        inputs=["topk", "hidden"],
        projected_size=4,
        state_size=3,
    )
    model = GateModel(agreed)
    before = [parameter.clone() for parameter in model.parameters()]
    settings = Refinement(steps=2, prompts_per_step=2, group=2, max_tokens=3)
    refine(model, agreed, ensemble, prompts(ensemble), settings, seed=0)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_shipped_gate_fits_the_shipped_experts():
    contract = checkpoint.load(DEMO / "gate.pt").contract
    for name in NAMES:
        found = vocabulary_hash(DEMO / "experts" / name / "tokenizer.json")
        assert mismatches(contract, experts=list(NAMES), vocabulary_hash=found, top_k=32, hidden_sizes=[128] * 3) == []


def test_shipped_gate_uses_two_experts_inside_one_answer():
    shipped = Ensemble({name: DEMO / "experts" / name for name in NAMES}, top_k=32)
    gate = checkpoint.load(DEMO / "gate.pt")
    policy = gate_policy("gate", gate.contract.space, gate, gate.contract.state_size)
    text = "Add 27 and 58, then reverse stone."
    cursor = shipped.prefill([shipped.encode([{"role": "user", "content": text}])])
    rollout = roll_out(shipped, cursor, policy, temperature=0.0, max_tokens=24, generator=torch.Generator())
    assert shipped.decode(responses(rollout)[0]) == "85, enots"
