"""Routing by prompt: what the oracle and the classifier choose."""

import torch

from gate.evaluate import Answers, Question
from gate.routing import fit_router, oracle, prompt_features, routed


def questions(texts):
    return [Question(str(i), "d", [{"role": "user", "content": text}], {}) for i, text in enumerate(texts)]


def test_oracle_takes_any_right_answer_and_routing_the_chosen_one():
    math, text = Answers(["2", "ab"], [1, 0]), Answers(["1", "ba"], [0, 1])
    assert oracle([math, text]).texts == ["2", "ba"]
    assert oracle([math, text]).right == [1, 1]
    assert routed([math, text], [1, 0]).texts == ["1", "ab"]
    assert routed([math, text], [1, 0]).right == [0, 0]


def test_classifier_learns_which_model_is_right_and_carries_over_to_new_prompts():
    sums = [f"Add {a} and {b}." for a in range(10, 20) for b in range(20, 30)]
    words = [f"Reverse {chr(97 + i % 26)}{chr(97 + i % 7)}{i % 3}o." for i in range(100)]
    right = torch.tensor([[1.0, 0.0]] * 100 + [[0.0, 1.0]] * 100)
    router = fit_router(prompt_features(questions(sums + words)), right)
    chosen = router.choose(prompt_features(questions(["Add 77 and 61.", "Reverse stone."])))
    assert chosen.tolist() == [0, 1]


def test_features_have_unit_length_and_differ():
    found = prompt_features(questions(["Add 1.", "Reverse it."]))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert found[0] @ found[1] < 0.9
