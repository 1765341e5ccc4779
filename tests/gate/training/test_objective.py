"""A gate on recorded responses: its coefficients, what they make of every token, and the two objectives."""

import dataclasses

import pytest
import torch

from gate.model import GateModel
from gate.training.dataset import Served
from gate.training.objective import (
    broadcast_loss,
    clipped_policy_loss,
    divergence,
    gate_coefficients,
    group_advantages,
    served_law,
    token_logprobs,
)
from tests.support.gate_examples import EXPERTS, VOCABULARY, contract, made_up, records, whole

CPU = torch.device("cpu")


def test_a_batch_walks_each_response():
    made = dataclasses.replace(records(responses=3, length=3), lengths=torch.tensor([2, 3, 4]))
    batch = made.batch(torch.tensor([2, 0]), CPU)
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.tokens.tolist() == made.tokens[[5, 6, 7, 8, 0, 1]].tolist()
    assert batch.hidden[1].shape == (6, made.hidden[1].size(1))


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


def test_broadcast_loss_directions():
    logprobs = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    for reward, sign in ((1.0, -1), (0.0, 1)):
        loss = broadcast_loss(logprobs, mask, torch.tensor([reward]), negative_weight=0.5)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient[0, 0].sign() == sign
        assert gradient[0, 1] == 0


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
