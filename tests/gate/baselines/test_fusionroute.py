"""FusionRoute's losses against values worked out by hand, and the gate that serves its routing head."""

import copy
import json
import math
import random

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM as Causal
from transformers import AutoTokenizer, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from gate import checkpoint
from gate.baselines.fusionroute.data import Encoder, Sequences, batches, preferences
from gate.baselines.fusionroute.export import export
from gate.baselines.fusionroute.losses import combined, disagreement, preference_loss, routing_loss, sft_loss
from gate.baselines.fusionroute.train import RouterModel, Settings, fit_preferences, fit_references
from gate.baselines.greedy import Greedy
from gate.evaluation.prompts import Question, read_prompts
from gate.evaluation.results import Answers, EvaluationError, new_results, save_results
from tests.support.paths import ROOT

AGREE = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]
DIFFER = [[0.8, 0.1, 0.1], [0.2, 0.5, 0.3]]
EXPERTS = torch.tensor([AGREE, DIFFER]).log()  # [N=2, E=2, V=3]


def test_routing_loss_counts_only_tokens_where_the_experts_disagree():
    assert disagreement(EXPERTS).tolist() == [False, True]
    scores = torch.tensor([[5.0, -5.0], [math.log(3), 0.0]])  # weights 3/4 and 1/4 at the second token
    expected = -(0.75 * math.log(0.1) + 0.25 * math.log(0.5))
    assert routing_loss(scores, EXPERTS, torch.tensor([0, 1])).item() == pytest.approx(expected)
    assert routing_loss(scores[:1], EXPERTS[:1], torch.tensor([0])).item() == 0.0


def test_sft_loss_adds_a_third_of_it():
    router = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    scores, targets = torch.zeros(2, 2), torch.tensor([0, 1])
    expected = math.log(2) + routing_loss(scores, EXPERTS, targets).item() / 3
    assert sft_loss(router, scores, EXPERTS, targets).item() == pytest.approx(expected)


def test_combined_policy_multiplies_the_routers_distribution_with_the_chosen_experts():
    router = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    scores = torch.tensor([[0.0, 1.0]], requires_grad=True)
    policy = combined(router, scores, EXPERTS[1:])
    weights = torch.tensor([0.5 * 0.2, 0.25 * 0.5, 0.25 * 0.3])
    torch.testing.assert_close(policy.exp()[0], weights / weights.sum())
    policy[0, 0].backward()
    assert router.grad.abs().sum() > 0
    assert scores.grad is None  # the choice of an expert is a constant


def test_preference_loss_is_dpo():
    at_start = preference_loss(*(torch.tensor([-3.0]) for _ in range(4)))
    assert at_start.item() == pytest.approx(math.log(2))
    moved = preference_loss(*(torch.tensor([value]) for value in (-1.0, -9.0, -3.0, -4.0)))  # margin 2 + 5
    assert moved.item() == pytest.approx(math.log(1 + math.exp(-0.1 * 7)))


def test_exported_gate_picks_one_expert_and_keeps_the_router(tmp_path):
    head = nn.Linear(4, 2)
    nn.init.constant_(head.bias, 0.0)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    tokenizer = ROOT / "deploy/demo/experts/math/tokenizer.json"
    export(head, ["math", "text"], "router", [8, 8, 4], tokenizer, tmp_path / "gate.pt")
    gate = checkpoint.load(tmp_path / "gate.pt")
    assert gate.contract.experts == ["math", "text", "router"]
    hidden = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 1.0, 0, 0]])
    others = [gate.project(i, torch.randn(3, 8)) for i in range(2)]
    projected = torch.stack([*others, gate.project(2, hidden)], dim=1)
    logprobs = torch.full((3, 3, 5), -1.0)
    logprobs[2, 1] = -torch.inf  # text is absent from the last row
    found, _ = gate.forward(logprobs, torch.zeros(3, 3, 5, dtype=torch.int64), projected, torch.zeros(3, 0))
    assert found.tolist() == [[1, 0, 1], [0, 1, 1], [1, 0, 1]]


def test_preferences_pair_right_with_wrong_and_fall_back_to_the_reference(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "?"}], "answer": f"right {i}"} for i in range(3)]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = new_results(prompts, read_prompts(prompts), "exact")
    results.models = {"a": Answers(["A0", "A1", "A2"], [1, 0, 1]), "b": Answers(["B0", "B1", "B2"], [0, 0, 1])}
    save_results(results, tmp_path / "r.json")
    pairs = preferences(prompts, tmp_path / "r.json", random.Random(0))
    assert [(right, wrong) for _, right, wrong in pairs] == [("A0", "B0"), ("right 1", pairs[1][2])]
    assert pairs[1][2] in {"A1", "B1"}
    assert preferences(prompts, tmp_path / "r.json", random.Random(0), limit=1) == pairs[:1]
    prompts.write_text(prompts.read_text().replace("right 0", "right 9"))
    with pytest.raises(EvaluationError, match="not the prompts that"):
        preferences(prompts, tmp_path / "r.json", random.Random(0))


def test_an_epoch_holds_everything_once():
    found = list(batches(list(range(10)), 4, random.Random(0)))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert sorted(item for batch in found for item in batch) == list(range(10))


def small_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_training_makes_right_answers_probable_and_leaves_the_experts_alone():
    encoder = Encoder(AutoTokenizer.from_pretrained(ROOT / "deploy/demo/experts/math", local_files_only=True))
    questions = [Question(str(i), "d", [{"role": "user", "content": f"Say {i}."}], {}) for i in range(8)]
    pairs = [(question, question.id * 2) for question in questions]
    router = RouterModel(small_model(0), [small_model(1), small_model(2)], encoder, "cpu")
    frozen = [parameter.clone() for expert in router.experts for parameter in expert.parameters()]
    _, before = router.measure(pairs, 4)
    fit_references(router, pairs, pairs, Settings(epochs=5, batch_size=4, learning_rate=1e-2), seed=0)
    share, trained = router.measure(pairs, 4)
    assert trained > before + 1
    head = router.head.weight.clone()
    wrong = [(question, text, "no") for question, text in pairs]
    fit_preferences(router, wrong, pairs, Settings(epochs=1, batch_size=4), seed=0)
    assert router.measure(pairs, 4)[0] >= share
    assert torch.equal(router.head.weight, head)
    after = [parameter for expert in router.experts for parameter in expert.parameters()]
    assert all(torch.equal(*both) for both in zip(frozen, after, strict=True))


SMALL = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "config",
    [Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=1.0), GraniteConfig(**SMALL, logits_scaling=0.1)],
    ids=["soft cap", "scale"],
)
def test_logprobs_are_those_of_the_whole_model(config, tmp_path):
    """Also where the model changes what its output layer gives, which only its own forward pass knows."""
    model = Causal.from_config(config).eval()
    folder = ROOT / "deploy/demo/experts/math"
    encoder = Encoder(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    row = {"messages": [{"role": "user", "content": "hi"}], "answer": "long answer"}
    question = Question("0", "d", row["messages"], row)
    rows = encoder.batch([(question, row["answer"]), (question, "no")])
    router = RouterModel(copy.deepcopy(model), [model], encoder, "cpu")
    router.model.eval()
    with torch.no_grad():
        whole = model(rows.ids[:, :-1]).logits[rows.answer[:, 1:]].log_softmax(-1)
        entering = model.model(rows.ids[:, :-1]).last_hidden_state[rows.answer[:, 1:]]
        assert not torch.allclose(model.lm_head(entering).log_softmax(-1), whole, atol=1e-2)
        logprobs, scores, targets = router.forward(rows)
    torch.testing.assert_close(logprobs, whole)
    torch.testing.assert_close(router.expert_logprobs(rows)[:, 0], whole)
    torch.testing.assert_close(scores, router.head(entering))
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    count = int(rows.answer[0].sum())
    expected = float(whole[:count].gather(1, targets[:count].unsqueeze(1)).sum())
    assert Greedy(model, folder, tmp_path / "p.jsonl").answer_logprob() == pytest.approx(expected, rel=1e-4)


def test_response_logprobs_sum_each_rows_own_answer():
    encoder = Encoder(AutoTokenizer.from_pretrained(ROOT / "deploy/demo/experts/math", local_files_only=True))
    questions = [Question(str(i), "d", [{"role": "user", "content": "x" * (5 * i)}], {}) for i in range(2)]
    router = RouterModel(small_model(0), [small_model(1), small_model(2)], encoder, "cpu")
    rows = router.rows([(questions[0], "long answer"), (questions[1], "no")])
    together = router.response_logprobs(rows, router.expert_logprobs(rows))
    for at, (question, text) in enumerate([(questions[0], "long answer"), (questions[1], "no")]):
        alone = router.rows([(question, text)])
        torch.testing.assert_close(router.response_logprobs(alone, router.expert_logprobs(alone))[0], together[at])


def test_an_answer_counts_as_right_when_greedy_decoding_gives_it():
    """Against decoding one token at a time."""
    encoder = Encoder(AutoTokenizer.from_pretrained(ROOT / "deploy/demo/experts/math", local_files_only=True))
    question = Question("0", "d", [{"role": "user", "content": "hi"}], {})
    experts = [small_model(1), small_model(2)]
    router = RouterModel(small_model(0), experts, encoder, "cpu")
    ids, start = encoder(question, "")
    made = []
    for _ in range(3):
        tokens = torch.tensor([[*ids[:start], *made]])
        hidden = router.model.model(tokens).last_hidden_state[0, -1]
        chosen = experts[int(router.head(hidden).argmax())]
        made.append(int((router.model(tokens).logits[0, -1] + chosen(tokens).logits[0, -1].log_softmax(-1)).argmax()))
    rows = Sequences(torch.tensor([[*ids[:start], *made]]), torch.arange(start + 3).unsqueeze(0) >= start)
    router.rows = lambda pairs: rows
    assert router.measure([(question, "")], 1)[0] == 1.0
    rows.ids[0, -1] += 1
    assert router.measure([(question, "")], 1)[0] == 0.0
