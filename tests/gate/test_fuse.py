"""Fusion over truncated lists against full-vocabulary fusion."""

import pytest
import torch

from gate.fuse import candidates, fuse
from tests.support.gate_examples import rest, token_logprobs


def distributions(rows=6, experts=3, vocabulary=20, scale=2.0):
    return (scale * torch.randn(rows, experts, vocabulary)).log_softmax(-1)


def listed(logprobs, k, tokens=None):
    """The candidates of the k best of each of `logprobs` [N, E, V], and of `tokens` (each row's first best)."""
    best = logprobs.topk(k)
    tokens = best.indices[:, 0, 0] if tokens is None else tokens
    left = rest(logprobs, best.indices)
    return candidates(best.values, best.indices, left, tokens, token_logprobs(logprobs, tokens), logprobs.size(2))


def exact(logprobs, weights, space):
    """Scores [N, V], and their normalisers' logarithms [N]."""
    if space == "logprob":
        scores = torch.einsum("ne,nev->nv", weights, logprobs)
    else:
        scores = torch.einsum("ne,nev->nv", weights, logprobs.exp()).log()
    return scores, scores.logsumexp(1)


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_full_lists_give_the_exact_fusion(space):
    logprobs, weights = distributions(), torch.rand(6, 3).softmax(-1)
    union = listed(logprobs, 20)
    fused = fuse(weights, union, space)
    used = union.ids >= 0
    assert used.sum(1).tolist() == [20] * 6
    told = exact(logprobs, weights, space)[0].log_softmax(1)
    torch.testing.assert_close(fused[used], told.gather(1, union.ids.clamp_min(0))[used])


def test_missing_ids_follow_the_tail_rule():
    probabilities = torch.tensor([[[0.6, 0.3, 0.06, 0.04], [0.06, 0.4, 0.5, 0.04]]])
    union = listed(probabilities.log(), 2)
    values = {int(i): union.logprobs[0, :, u].exp() for u, i in enumerate(union.ids[0]) if i >= 0}
    assert values.keys() == {0, 1, 2}
    torch.testing.assert_close(values[0], torch.tensor([0.6, 0.06]))  # the response's token: known
    torch.testing.assert_close(values[1], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(values[2], torch.tensor([0.05, 0.5]))  # 0.1 left over two unseen tokens
    assert union.outside.count.tolist() == [1]
    torch.testing.assert_close(union.outside.mass.exp(), torch.tensor([[0.05, 0.04]]))
    torch.testing.assert_close(union.outside.largest.exp(), torch.tensor([[0.05, 0.04]]))


def test_a_token_that_nobody_lists_is_a_candidate_with_what_every_expert_says_of_it():
    logprobs = distributions()
    unlisted = logprobs.amax(1).argmin(1)
    union = listed(logprobs, 4, unlisted)
    rows = torch.arange(6)
    assert union.ids[rows, union.token_slot].tolist() == unlisted.tolist()
    torch.testing.assert_close(union.logprobs[rows, :, union.token_slot], token_logprobs(logprobs, unlisted))
    assert union.listed[rows, :, union.token_slot].all()


@pytest.mark.parametrize("space", ["logprob", "prob"])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 1.8])
@pytest.mark.parametrize("total", [1.0, 2.5, 0.5])
def test_what_is_outside_has_the_bound_of_what_each_expert_leaves(space, temperature, total):
    """Where all experts list the same tokens, and so nothing is estimated: the normaliser is at least the true one,
    and in `prob` space at temperature 1 the true one."""
    base = distributions(rows=200, experts=1, vocabulary=500)
    order = base.argsort(2, descending=True)
    noise = distributions(rows=200, vocabulary=500, scale=0.7)
    inside = torch.zeros(200, 1, 500, dtype=torch.bool).scatter(2, order[:, :, :40], True)
    logprobs = (base + noise + 5.0 * inside).log_softmax(2)
    weights = total * torch.rand(200, 3).softmax(-1)
    union = listed(logprobs, 40)
    assert (union.ids >= 0).sum(1).eq(40).all()
    scores, _ = exact(logprobs, weights, space)
    true = (scores / temperature).log_softmax(1).gather(1, union.ids.clamp_min(0))
    used = union.ids >= 0
    over = (true - fuse(weights, union, space, temperature))[used]
    assert over.min() > -1e-4
    if space == "prob" and temperature == 1.0:
        assert over.max() < 1e-4
    union_only = (scores / temperature).gather(1, union.ids.clamp_min(0)).masked_fill(~used, -torch.inf).log_softmax(1)
    if (total if space == "logprob" else 1.0) / temperature <= 1:  # else what is outside hardly counts
        assert over.mean() < 0.5 * (union_only - true)[used].mean()


def test_nothing_is_outside_for_a_negative_coefficient():
    union = listed(distributions(), 4)
    fused = fuse(torch.tensor([[1.5, -0.5, 0.0]]).expand(6, 3), union, "logprob")
    torch.testing.assert_close(fused.exp().sum(1), torch.ones(6))


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_absent_candidates_never_appear(space):
    logprobs = distributions(rows=3)
    best = logprobs.topk(8)
    best.values[:, 0, 2:], best.indices[:, 0, 2:] = -torch.inf, -1  # as under a grammar
    tokens = best.indices[:, 0, 0]
    left = torch.full((3, 3), -9.0)
    union = candidates(best.values, best.indices, left, tokens, token_logprobs(logprobs, tokens), 20)
    fused = fuse(torch.full((3, 3), 1 / 3), union, space)
    assert not fused.isnan().any()
    assert (fused[union.ids < 0] == -torch.inf).all()
    total = fused.exp().sum(1)
    assert (total <= 1 + 1e-6).all() and ((total > 1 - 1e-6).all() or space == "prob")
