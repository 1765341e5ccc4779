"""Records on disk, and both objectives on made-up experts of which one knows each token."""

import pytest
import torch

from gate import dataset
from gate.model import GateModel
from gate.objective import (
    broadcast_loss,
    clipped_policy_loss,
    gate_coefficients,
    group_advantages,
    prepare,
    token_logprobs,
)
from gate.train import Broadcast, fit_broadcast
from tests.gate.examples import contract, records


def test_records_round_trip(tmp_path):
    made = records()
    made.save(tmp_path / "traces.safetensors")
    found = dataset.load(tmp_path / "traces.safetensors")
    assert (found.experts, found.sources, found.vocabulary_size) == (made.experts, made.sources, 20)
    assert found.tokens.tolist() == made.tokens.tolist()
    assert found.rewards.tolist() == made.rewards.tolist()
    torch.testing.assert_close(found.topk_logprobs, made.topk_logprobs, atol=0.02, rtol=0.01)
    torch.testing.assert_close(found.hidden[1], made.hidden[1], atol=0.02, rtol=0.01)


def test_padded_index_walks_each_response():
    made = records(responses=3, length=2)
    index, mask = made.padded_index(torch.tensor([2, 0]))
    assert index.tolist() == [[4, 5], [0, 1]]
    assert mask.all()


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("state_size", [0, 5])
def test_training_lowers_the_loss_and_finds_the_expert_that_knows(space, state_size):
    agreed = contract(state_size=state_size, space=space)
    model = GateModel(agreed)
    made = records(responses=80)
    settings = Broadcast(epochs=20, batch_size=16, negative_weight=1.0)
    history = fit_broadcast(model, agreed, prepare(made), settings, seed=0)
    assert history[-1] < 0.7 * history[0]
    unseen = records(responses=20, seed=1)
    index, _ = unseen.padded_index(torch.arange(20))
    chosen = gate_coefficients(model, state_size, unseen, index).argmax(-1).reshape(-1)
    knows = unseen.hidden[0][:, :3].argmax(1)
    assert (chosen == knows).float().mean() > 0.9


def test_recurrent_coefficients_equal_a_loop_over_tokens():
    agreed = contract(state_size=5)
    model = GateModel(agreed).eval()
    made = records(responses=4)
    index, _ = made.padded_index(torch.arange(4))
    along = gate_coefficients(model, 5, made, index)
    state = torch.zeros(1, 5)
    for step, row in enumerate(index[3].tolist()):
        projected = torch.stack([model.project(i, h[row : row + 1]) for i, h in enumerate(made.hidden)], 1)
        now, state = model(made.topk_logprobs[row : row + 1], made.topk_ids[row : row + 1], projected, state)
        torch.testing.assert_close(along[3, step], now[0])


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


def test_policy_gradient_raises_rewarded_responses():
    agreed = contract()
    model = GateModel(agreed)
    prepared = prepare(records(responses=16))
    chosen = torch.arange(16)
    advantages = group_advantages(prepared.records.rewards, group=2)
    with torch.no_grad():
        old, _ = token_logprobs(model, 0, "logprob", prepared, chosen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        now, mask = token_logprobs(model, 0, "logprob", prepared, chosen)
        optimizer.zero_grad()
        clipped_policy_loss(now, old, mask, advantages, clip=10.0).backward()
        optimizer.step()
    gain = ((now - old) * mask).sum(1)
    assert gain[advantages > 0].mean() > 0 > gain[advantages < 0].mean()
