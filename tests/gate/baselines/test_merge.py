"""Merging, against values worked out by hand."""

import json
import shutil

import pytest
import torch

from gate.baselines.greedy import Greedy
from gate.baselines.merge import MergeError, Recipe, check_models, drop, elect, merge, recipes, trim, tune
from gate.baselines.models import load_model, save_model
from tests.support.paths import ROOT

EXPERTS = ROOT / "deploy/demo/experts"

BASE = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
ONE = {"w": torch.tensor([3.0, 1.0, 0.0, 1.5])}  # task vector 2, 0, -1, 0.5
TWO = {"w": torch.tensor([2.0, 0.0, 4.0, 1.0])}  # task vector 1, -1, 3, 0


def merged(**settings):
    return merge(Recipe(**settings), BASE, [ONE, TWO])["w"].tolist()


def test_linear_is_the_mean_and_needs_no_base():
    assert merge(Recipe("linear"), None, [ONE, TWO])["w"].tolist() == [2.5, 0.5, 2.0, 1.25]


def test_task_arithmetic_adds_scaled_task_vectors():
    assert merged(method="task-arithmetic", scale=0.5) == [2.5, 0.5, 2.0, 1.25]
    assert merged(method="task-arithmetic", scale=0.0) == BASE["w"].tolist()


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
    """Halves kept: (2, 0, -1, 0) and (1, 0, 3, 0) or (0, -1, 3, 0); the first of equals, 1, stays. Signs: +, 0, +, 0.
    The -1 disagrees with the elected + and does not count: (1.5, 0, 3, 0)."""
    assert merged(method="ties", scale=1.0, density=0.5) == [2.5, 1.0, 4.0, 1.0]


def test_trim_keeps_the_largest_magnitudes():
    assert trim(torch.tensor([[0.1, -5.0], [2.0, 0.3]]), 0.5).tolist() == [[0.0, -5.0], [2.0, 0.0]]


def test_elect_ignores_zeros_and_the_other_sign():
    assert elect(torch.tensor([[4.0, -1.0, 0.0], [2.0, 0.5, 0.0], [0.0, -2.0, 0.0]])).tolist() == [3.0, -1.5, 0.0]


def test_drop_keeps_the_expectation_and_the_share():
    tasks = torch.full((2, 50_000), 3.0)
    dropped = drop(tasks, 0.25, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 12.0}
    assert abs(float(dropped.mean()) - 3.0) < 0.1


def test_dare_is_seeded_and_without_dropping_is_task_arithmetic():
    assert merged(method="dare", scale=0.5, density=1.0) == merged(method="task-arithmetic", scale=0.5)
    assert merged(method="dare-ties", density=1.0) == merged(method="ties", density=1.0)
    assert merged(method="dare", density=0.5, seed=3) == merged(method="dare", density=0.5, seed=3)


def test_methods_with_task_vectors_need_a_base():
    with pytest.raises(MergeError, match="ties needs"):
        merge(Recipe("ties"), None, [ONE, TWO])


def test_a_stranger_is_not_taken_for_the_base():
    """The experts are 4.3 apart; 2.3 and 3.3 from their base."""
    assert check_models(BASE, {"one": ONE, "two": TWO}) == pytest.approx({"one": 5.25**0.5, "two": 11**0.5})
    with pytest.raises(MergeError, match=r"not where these experts started: one and two are 4\.3 apart"):
        check_models({"w": torch.tensor([9.0, -9.0, 9.0, 9.0])}, {"one": ONE, "two": TWO})


def test_other_shapes_are_refused():
    with pytest.raises(MergeError, match="two and one differ"):
        check_models(None, {"one": ONE, "two": {"w": torch.zeros(3)}})


def test_what_tuning_tries():
    assert [len(list(recipes(method, 0))) for method in ("linear", "task-arithmetic", "ties")] == [1, 5, 10]


def test_tuning_asks_the_merged_models_and_the_best_is_saved(tmp_path):
    """Two copies of one expert merge to it, if only averaged; the math expert adds, and does not reverse."""
    rows = [
        {"messages": [{"role": "user", "content": "Add 27 and 58."}], "answer": "85"},
        {"messages": [{"role": "user", "content": "Reverse stone."}], "answer": "enots"},
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = load_model(EXPERTS / "math")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    recipe, tried = tune("linear", None, [state, state], Greedy(model, EXPERTS / "math", prompts), 0)
    assert (recipe, tried[0]["accuracy"]) == (Recipe("linear"), 0.5)
    assert tried[0]["answer_logprob"] < -1
    like = tmp_path / "like"
    shutil.copytree(EXPERTS / "math", like)
    config = json.loads((like / "config.json").read_text())
    kind = config.pop("dtype")
    assert kind != "float32"
    (like / "config.json").write_text(json.dumps({**config, "torch_dtype": kind}))
    (like / "chat_template.jinja").write_text("{{ messages }}")
    save_model(model, like, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == kind
    again = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
