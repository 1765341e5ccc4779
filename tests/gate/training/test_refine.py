"""Refinement on made-up experts of which one knows each token."""

import copy
import dataclasses

import pytest
import torch

from gate.model import GateModel
from gate.training.dataset import Served
from gate.training.fit import FitProgress
from gate.training.objective import gate_coefficients, group_advantages
from gate.training.refine import Refinement, refine, update
from tests.support.gate_examples import EXPERTS, VOCABULARY, contract, made_up, records, topk, whole

CPU = torch.device("cpu")


def silent(progress):
    pass


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
