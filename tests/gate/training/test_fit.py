"""Both objectives on made-up experts of which one knows each token; what is kept, split, stopped and taken up again."""

import copy
import dataclasses

import pytest
import torch

from gate.model import GateModel
from gate.training.curves import Point, plot, write_csv
from gate.training.dataset import Served
from gate.training.fit import Broadcast, FitProgress, TrainingError, fit, held_out, split
from gate.training.objective import (
    broadcast_loss,
    clipped_policy_loss,
    divergence,
    gate_coefficients,
    group_advantages,
    served_law,
    token_logprobs,
)
from gate.training.refine import Refinement, refine, update
from tests.support.gate_examples import EXPERTS, VOCABULARY, contract, made_up, records, topk

CPU = torch.device("cpu")


def silent(progress):
    pass


def everything(made):
    return torch.arange(len(made.rewards)), torch.arange(0)


def test_a_batch_walks_each_response():
    made = dataclasses.replace(records(responses=3, length=3), lengths=torch.tensor([2, 3, 4]))
    batch = made.batch(torch.tensor([2, 0]), CPU)
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.tokens.tolist() == made.tokens[[5, 6, 7, 8, 0, 1]].tolist()
    assert batch.hidden[1].shape == (6, made.hidden[1].size(1))


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


@pytest.mark.parametrize(("inputs", "state_size"), [(("topk",), 0), (("hidden",), 0), (("topk", "hidden"), 5)])
def test_coefficients_in_training_are_those_of_serving(inputs, state_size):
    agreed = contract(inputs, state_size=state_size)
    model = GateModel(agreed).eval()
    batch = records(responses=4).batch(torch.arange(4), CPU)
    along = gate_coefficients(model, batch)
    state = torch.zeros(1, state_size)
    first = int(batch.mask[:3].sum())
    for row in range(first, first + int(batch.mask[3].sum())):
        rows = slice(row, row + 1)
        projected = torch.stack([model.project(i, hidden[rows]) for i, hidden in enumerate(batch.hidden)], 1)
        now, state = model(batch.topk_logprobs[rows], batch.topk_ids[rows], projected, state)
        torch.testing.assert_close(along[row], now[0])


def unlisted_first(made, logprobs):
    """Has a token that nobody lists at the first place."""
    absent = (set(range(VOCABULARY)) - set(made.topk_ids[0].reshape(-1).tolist())).pop()
    made.tokens[0] = absent
    made.token_logprobs[0] = logprobs[0, :, absent]


def test_tokens_that_nobody_lists_count():
    made, logprobs = made_up(responses=1, length=2)
    unlisted_first(made, logprobs)
    model = GateModel(contract())
    batch = made.batch(torch.arange(1), CPU)
    found, mask = token_logprobs(model, "logprob", batch)
    assert mask.all()
    exact = torch.einsum("ne,nev->nv", gate_coefficients(model, batch), logprobs).log_softmax(1)
    torch.testing.assert_close(found[0], exact[torch.arange(2), made.tokens.long()], atol=0.2, rtol=0)


def test_an_expert_that_is_absent_makes_no_nan():
    """Without weight it says nothing; where all are absent nothing is learned."""
    made, logprobs = made_up(responses=1, length=2)
    unlisted_first(made, logprobs)
    for absent, counts in (([0], [[True, True]]), ([0, 1, 2], [[False, True]])):
        for tensor, value in ((made.topk_logprobs, -torch.inf), (made.topk_ids, -1), (made.token_logprobs, -torch.inf)):
            tensor[0, absent] = value
        found, mask = token_logprobs(GateModel(contract()), "logprob", made.batch(torch.arange(1), CPU))
        assert mask.tolist() == counts
        assert found.isfinite().all() and divergence(found, found, mask) == 0


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_log_probabilities_are_those_of_the_law_that_sampled(space, temperature):
    """With normalisers over the whole vocabulary: for every token, listed or not, at the coefficients that sampled."""
    made, logprobs = made_up(responses=30)
    made.tokens[:] = torch.randint(VOCABULARY, made.tokens.shape)
    made.token_logprobs[:] = logprobs[torch.arange(120), :, made.tokens.long()]
    coefficients = torch.randn(120, len(EXPERTS)).softmax(1)
    exact = whole(coefficients, logprobs, space) / temperature
    batch = dataclasses.replace(made, served=Served(coefficients, exact.logsumexp(1))).batch(torch.arange(30), CPU)
    law = served_law(batch, batch.served, space, temperature)
    found, mask = law.token_logprobs(coefficients)
    assert mask.all()
    told = exact.log_softmax(1)[torch.arange(120), made.tokens.long()]
    torch.testing.assert_close(found.flatten(), told, atol=1e-5, rtol=1e-5)
    moved = torch.randn(120, len(EXPERTS)).mul(0.1).add(coefficients.log()).softmax(1)
    after = (whole(moved, logprobs, space) / temperature).log_softmax(1)[torch.arange(120), made.tokens.long()]
    off = (law.token_logprobs(moved)[0].flatten() - after).abs()
    assert off.mean() < 0.1 * (after - told).abs().mean()


def whole(coefficients, logprobs, space):
    """Fused scores [N, V] over the whole vocabulary."""
    if space == "logprob":
        return torch.einsum("ne,nev->nv", coefficients, logprobs)
    return torch.einsum("ne,nev->nv", coefficients, logprobs.exp()).log()


def test_broadcast_loss_directions():
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    for reward, sign in ((1.0, -1), (0.0, 1)):
        loss = broadcast_loss(logprobs, mask, torch.tensor([reward]), negative_weight=0.5)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient[0, 0].sign() == sign
        assert gradient[0, 1] == 0


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


def test_group_advantages():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group=2)
    assert advantages[0] > 0 > advantages[1]
    assert advantages[2:].tolist() == [0, 0]


def test_divergence_is_nothing_at_the_start_and_positive_away_from_it():
    mask = torch.tensor([[True, True, False]])
    start = torch.tensor([[-1.0, -2.0, -9.0]])
    assert divergence(start, start, mask) == 0
    assert divergence(start + torch.tensor([[0.3, -0.2, 5.0]]), start, mask) > 0


def test_policy_gradient_raises_rewarded_responses():
    model, made = GateModel(contract()), records(responses=16)
    batch = made.batch(torch.arange(16), CPU)
    advantages = group_advantages(made.rewards, group=2)
    with torch.no_grad():
        old, _ = token_logprobs(model, "logprob", batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        now, mask = token_logprobs(model, "logprob", batch)
        optimizer.zero_grad()
        clipped_policy_loss(now, old, mask, advantages, clip=10.0).backward()
        optimizer.step()
    gain = ((now - old) * mask).sum(1)
    assert gain[advantages > 0].mean() > 0 > gain[advantages < 0].mean()


def everything_listed(responses):
    """Responses of one token, over lists that hold the whole vocabulary."""
    generator = torch.Generator().manual_seed(1)
    logprobs, ids = topk(responses, generator, listed=VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (responses,), generator=generator)
    own = torch.empty(responses, len(EXPERTS), VOCABULARY).scatter_(2, ids, logprobs)
    return dataclasses.replace(
        records(responses, length=1),
        topk_logprobs=logprobs.half(),
        topk_ids=ids.int(),
        rest=torch.full((responses, len(EXPERTS)), -torch.inf),
        tokens=tokens.int(),
        token_logprobs=own[torch.arange(responses), :, tokens],
    )


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_refinement_follows_the_policy_that_drew(temperature):
    """Against the gradient of sum_i advantage_i log p_T(token_i), with p_T worked out over the whole vocabulary."""
    made = everything_listed(8)
    agreed = contract(("topk",))
    model = GateModel(agreed)
    before, parameters = copy.deepcopy(model), [*model.parameters()]
    settings = Refinement(steps=1, group=8, epochs=1, divergence_weight=0.0, temperature=temperature)
    batch = made.batch(torch.arange(8), CPU)
    own = torch.empty(8, len(EXPERTS), VOCABULARY).scatter_(2, batch.topk_ids, batch.topk_logprobs)
    coefficients = gate_coefficients(before, batch)
    scores = torch.einsum("ne,nev->nv", coefficients, own) / temperature
    made = dataclasses.replace(made, served=Served(coefficients.detach(), scores.logsumexp(1).detach()))
    update(model, copy.deepcopy(model), "logprob", made, settings, torch.optim.SGD(parameters, lr=1e-3))
    told = scores.log_softmax(1)[torch.arange(8), batch.tokens]
    wanted = torch.autograd.grad((group_advantages(made.rewards, 8) * told).mean(), [*before.parameters()])
    moved = [after - was for after, was in zip(parameters, before.parameters(), strict=True)]
    one, other = (torch.cat([part.flatten() for part in parts]).double() for parts in (moved, wanted))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9999


class MadeUpPolicy:
    """Prompt n has the tokens of one recorded response; a sample is right where it follows the expert that knows."""

    def __init__(self, agreed):
        self._contract = agreed
        self._world, self._logprobs = made_up(responses=64)
        self.asked = []

    def load(self, model):
        self._model = copy.deepcopy(model)

    def sample(self, prompts, copies, *, temperature, seed):
        self.asked.append((tuple(prompts), copies, temperature))
        chosen = torch.tensor(prompts).repeat_interleave(copies)
        batch = self._world.batch(chosen, CPU)
        with torch.no_grad():
            weights = gate_coefficients(self._model, batch)
        generator = torch.Generator().manual_seed(seed)
        drawn = weights.multinomial(1, generator=generator).squeeze(1) if temperature else weights.argmax(1)
        tokens = batch.topk_ids[:, :, 0].gather(1, drawn.unsqueeze(1)).squeeze(1)
        knows = batch.hidden[0][:, :3].argmax(1)
        right = torch.zeros(batch.mask.shape).masked_scatter(batch.mask, (drawn == knows).float()).mean(1)
        rows = torch.arange(len(self._world.tokens)).reshape(64, -1)[chosen].reshape(-1)
        logprobs = self._logprobs[rows]
        normaliser = whole(weights, logprobs, "logprob").logsumexp(1)
        return dataclasses.replace(
            self._world,
            topk_logprobs=self._world.topk_logprobs[rows],
            topk_ids=self._world.topk_ids[rows],
            hidden=[hidden[rows] for hidden in self._world.hidden],
            rest=self._world.rest[rows],
            tokens=tokens.int(),
            token_logprobs=logprobs[torch.arange(len(rows)), :, tokens],
            lengths=self._world.lengths[chosen],
            rewards=right,
            prompts=[f"p{number}" for number in chosen.tolist()],
            served=Served(weights, normaliser) if temperature else None,
        )


def test_refinement_raises_the_greedy_reward_on_held_out_prompts():
    agreed = contract()
    policy, model, progress = MadeUpPolicy(agreed), GateModel(agreed), FitProgress(phase="refine")
    settings = Refinement(steps=30, prompts=16, group=8, learning_rate=5e-3, interval=10)
    refine(model, agreed, policy, (list(range(48)), list(range(48, 64))), settings, progress, seed=0, report=silent)
    measured = [point.validation for point in progress.points if point.validation is not None]
    assert measured[-1] > measured[0] + 0.2
    assert progress.score == max(measured)
    assert max(point.divergence or 0 for point in progress.points) > 0
    drawn = {prompt for prompts, copies, _ in policy.asked if copies == 8 for prompt in prompts}
    assert drawn <= set(range(48))


def test_a_refinement_that_was_killed_after_its_early_stop_does_not_go_on():
    agreed = contract()
    policy, model = MadeUpPolicy(agreed), GateModel(agreed)
    progress = FitProgress(phase="refine")
    settings = Refinement(steps=50, prompts=4, group=4, learning_rate=0.0, interval=1, patience=2)
    refine(model, agreed, policy, ([0, 1, 2, 3], [4, 5]), settings, progress, seed=0, report=silent)
    assert (progress.step, progress.since) == (2, 2)
    policy.asked.clear()
    refine(model, agreed, policy, ([0, 1, 2, 3], [4, 5]), settings, progress, seed=0, report=silent)
    assert progress.step == 2 and not policy.asked


def test_a_step_without_a_difference_changes_nothing():
    agreed = contract()
    policy, model = MadeUpPolicy(agreed), GateModel(agreed)
    same = policy.sample

    def alike(prompts, copies, *, temperature, seed):
        made = same(prompts, copies, temperature=temperature, seed=seed)
        return dataclasses.replace(made, rewards=torch.ones_like(made.rewards))

    policy.sample = alike
    before = [parameter.clone() for parameter in model.parameters()]
    settings = Refinement(steps=2, prompts=4, group=4)
    refine(model, agreed, policy, ([0, 1, 2, 3], []), settings, FitProgress(phase="refine"), seed=0, report=silent)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_curves(tmp_path):
    points = [Point("broadcast", 50, 1.0, 0.9), Point("refine", 0, validation=0.5), Point("refine", 1, reward=0.4)]
    write_csv(points, tmp_path / "curves.csv")
    plot(points, tmp_path / "curves.png")
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0] == "phase,step,loss,validation,reward,divergence"
    assert lines[1] == "broadcast,50,1.0,0.9,,"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_token_that_the_fusion_finds_impossible_teaches_nothing():
    shown = records(responses=2)
    shown.tokens[0] = shown.topk_ids[0, 0, -1]
    shown.topk_logprobs[0, 0, -1] = shown.token_logprobs[0, 0] = -torch.inf
    batch = shown.batch(torch.tensor([0, 1]), torch.device("cpu"))
    model = GateModel(contract())
    logprobs, mask = token_logprobs(model, "logprob", batch)
    assert mask.tolist() == [[False, True, True, True], [True] * 4]
    loss = clipped_policy_loss(logprobs, logprobs.detach(), mask, torch.tensor([1.0, -1.0]), 0.2)
    (loss + broadcast_loss(logprobs, mask, batch.rewards, 0.02)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
