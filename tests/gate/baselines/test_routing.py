"""Routing by prompt: what the oracle and the classifier choose."""

import json
import sys

import pytest
import torch

from gate.baselines import ablate, merge, routing
from gate.baselines.fusionroute import __main__ as fusionroute
from gate.baselines.routing import fit_router, oracle, prompt_features, routed
from gate.evaluation.prompts import Question, read_prompts
from gate.evaluation.results import Answers, load_results, new_results, save_results


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


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    module.main()


@pytest.fixture
def files(tmp_path):
    """Prompts and two models' answers to them, twice."""
    for name in ("a", "b"):
        rows = [
            {"id": f"{name}{i}", "messages": [{"role": "user", "content": f"{name} {i}"}], "answer": "1"}
            for i in range(10)
        ]
        prompts = tmp_path / f"{name}.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = new_results(prompts, read_prompts(prompts), "exact")
        results.models = {"m": Answers(["1"] * 10, [1, 0] * 5), "n": Answers(["2"] * 10, [0, 1] * 5)}
        save_results(results, tmp_path / f"{name}.json")
    return tmp_path


def route(monkeypatch, files, prompts, train_prompts):
    given = ["--results", files / "a.json", "--prompts", files / prompts, "--output", files / "r.json"]
    training = ["--train-results", files / "b.json", "--train-prompts", files / train_prompts]
    run(monkeypatch, routing, "--models", "m", "n", *given, *training)


def test_routing_of_results_and_the_prompts_that_they_answer(monkeypatch, files):
    route(monkeypatch, files, "a.jsonl", "b.jsonl")
    assert [*load_results(files / "r.json").models] == ["oracle routing", "learned routing"]


@pytest.mark.parametrize(("prompts", "training"), [("b.jsonl", "b.jsonl"), ("a.jsonl", "a.jsonl")])
def test_results_and_prompts_that_do_not_belong_together(monkeypatch, files, capsys, prompts, training):
    with pytest.raises(SystemExit) as ended:
        route(monkeypatch, files, prompts, training)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (1, 1)
    assert "not the prompts that" in error
    assert not (files / "r.json").exists()


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (routing, ["--models", "m", "--results", "absent", "--prompts", "absent", "--output", "o"]),
        (ablate, ["--gate", "absent", "--remove", "topk", "--output", "o"]),
        (merge, ["--experts", "absent", "--output", "o"]),
        (
            fusionroute,
            ["--experts", "a=absent", "--start", "absent", "--prompts", "p", "--validation", "v", "--output", "o"],
        ),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, tmp_path, capsys, module, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, module, *arguments)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (1, 1)
    assert error.startswith("python -m gate.")
