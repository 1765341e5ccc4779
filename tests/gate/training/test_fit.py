"""DLLG's objective on made-up experts of which one knows each token; what is kept, split, stopped and taken up."""

import copy
import dataclasses

import pytest
import torch

from gate.model import GateModel
from gate.training.curves import Point, plot, write_csv
from gate.training.fit import Broadcast, FitProgress, TrainingError, fit, held_out, split
from gate.training.objective import gate_coefficients
from tests.support.gate_examples import contract, records

CPU = torch.device("cpu")


def silent(progress):
    pass


def everything(made):
    return torch.arange(len(made.rewards)), torch.arange(0)


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("state_size", [0, 5])
def test_training_lowers_the_loss_and_finds_the_expert_that_knows(space, state_size):
    agreed = contract(state_size=state_size, space=space)
    model, made, progress = GateModel(agreed), records(responses=80), FitProgress()
    settings = Broadcast(updates=100, batch_size=16, negative_weight=1.0, interval=20)
    fit(model, agreed, made, everything(made), settings, progress, seed=0, report=silent)
    assert progress.points[-1].loss < 0.7 * progress.points[0].loss
    unseen = records(responses=20, seed=1)
    chosen = gate_coefficients(model, unseen.batch(torch.arange(20), CPU)).argmax(-1)
    knows = unseen.hidden[0][:, :3].argmax(1)
    assert (chosen == knows).float().mean() > 0.9


def test_split_is_by_prompt_and_seeded():
    made = dataclasses.replace(records(responses=200), prompts=[f"p{number // 5}" for number in range(200)])
    training, validation = split(made, seed=0, share=0.2, limit=None)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(200))
    names = [{made.prompts[number] for number in part.tolist()} for part in (training, validation)]
    assert not names[0] & names[1]
    assert 0.05 < len(names[1]) / 40 < 0.4
    again, other = (split(made, seed=seed, share=0.2, limit=None)[1].tolist() for seed in (0, 1))
    assert again == validation.tolist() != other
    fewer = split(made, seed=0, share=0.2, limit=50)
    assert len(fewer[0]) + len(fewer[1]) == 50
    assert not any(held_out(made.prompts[number], 0, 0.2) for number in fewer[0].tolist())


def test_nothing_to_learn_from():
    made = records(responses=10)
    for rewards, word in ((torch.zeros(10), "right"), (torch.ones(10), "wrong")):
        with pytest.raises(TrainingError, match=f"none of the 10 responses to train on is {word}"):
            split(dataclasses.replace(made, rewards=rewards), seed=0, share=0.0, limit=None)
    with pytest.raises(TrainingError, match="11 responses are wanted, the records have 10"):
        split(made, seed=0, share=0.0, limit=11)


def test_the_best_weights_are_kept_and_training_stops_early():
    """The rewards of the held-out prompts are turned round, so that learning makes them ever worse."""
    agreed, made = contract(), records(responses=60)
    made.rewards[40:] = 1 - made.rewards[40:]
    parts = torch.arange(40), torch.arange(40, 60)
    model, progress = GateModel(agreed), FitProgress()
    settings = Broadcast(updates=1000, batch_size=20, negative_weight=1.0, interval=5, patience=3)
    fit(model, agreed, made, parts, settings, progress, seed=0, report=silent)
    assert progress.step < 200
    measured = [point.validation for point in progress.points]
    assert measured[-1] > min(measured) == -progress.score
    assert all(torch.equal(progress.best[name], value) for name, value in model.state_dict().items())


def test_an_interrupted_training_ends_like_an_uninterrupted_one():
    agreed, made = contract(state_size=4), records(responses=60)
    parts = torch.arange(40), torch.arange(40, 60)
    settings = Broadcast(updates=30, batch_size=16, interval=5)
    whole, resumed = GateModel(agreed), GateModel(agreed)
    resumed.load_state_dict(whole.state_dict())
    fit(whole, agreed, made, parts, settings, FitProgress(), seed=3, report=silent)

    class InterruptError(Exception):
        pass

    def interrupt(progress):
        if progress.step == 15:
            kept.append(copy.deepcopy(progress))
            raise InterruptError

    kept: list[FitProgress] = []
    with pytest.raises(InterruptError):
        fit(resumed, agreed, made, parts, settings, FitProgress(), seed=3, report=interrupt)
    fresh = GateModel(agreed)
    fit(fresh, agreed, made, parts, settings, kept[0], seed=3, report=silent)
    for one, other in zip(whole.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_training_that_was_killed_after_its_early_stop_does_not_go_on():
    agreed, made = contract(), records(responses=60)
    made.rewards[40:] = 1 - made.rewards[40:]
    parts = torch.arange(40), torch.arange(40, 60)
    settings = Broadcast(updates=1000, batch_size=20, negative_weight=1.0, interval=5, patience=3)
    model, kept = GateModel(agreed), []
    fit(model, agreed, made, parts, settings, FitProgress(), seed=0, report=lambda now: kept.append(copy.deepcopy(now)))
    resumed, stopped = GateModel(agreed), kept[-1].step
    fit(resumed, agreed, made, parts, settings, kept[-1], seed=0, report=silent)
    assert kept[-1].step == stopped < 200
    assert all(torch.equal(*both) for both in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(("place", "words"), [(0, "the loss of update 1 is nan"), (50, "on held-out prompts is nan")])
def test_losses_that_are_no_numbers_are_named(place, words):
    agreed, made = contract(), records(responses=60, length=1)
    made.topk_logprobs[place] = torch.nan
    settings = Broadcast(updates=10, batch_size=40, interval=5)
    with pytest.raises(TrainingError, match=words):
        fit(
            GateModel(agreed),
            agreed,
            made,
            (torch.arange(40), torch.arange(40, 60)),
            settings,
            FitProgress(),
            seed=0,
            report=silent,
        )


def test_curves(tmp_path):
    points = [Point("broadcast", 50, 1.0, 0.9), Point("refine", 0, validation=0.5), Point("refine", 1, reward=0.4)]
    write_csv(points, tmp_path / "curves.csv")
    plot(points, tmp_path / "curves.png")
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0] == "phase,step,loss,validation,reward,divergence"
    assert lines[1] == "broadcast,50,1.0,0.9,,"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
