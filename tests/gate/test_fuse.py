"""Fusion over truncated lists against full-vocabulary fusion."""

import pytest
import torch

from gate.fuse import candidates, fuse, token_slots
from tests.support.gate_examples import VOCABULARY, topk


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_full_lists_give_the_exact_fusion(space):
    logits = torch.randn(6, 3, VOCABULARY)
    full = logits.log_softmax(-1)
    best = full.topk(VOCABULARY)
    weights = torch.rand(6, 3).softmax(-1)
    union = candidates(best.values, best.indices, VOCABULARY)
    fused = fuse(weights, union, space)
    if space == "logprob":
        exact = (weights.unsqueeze(2) * full).sum(1).log_softmax(-1)
    else:
        exact = (weights.unsqueeze(2) * full.exp()).sum(1).log()
    used = union.ids >= 0
    assert used.sum(1).tolist() == [VOCABULARY] * 6
    torch.testing.assert_close(fused[used], exact.gather(1, union.ids.clamp_min(0))[used])


def test_missing_ids_follow_the_tail_rule():
    probabilities = torch.tensor([[[0.6, 0.3], [0.5, 0.4]]])
    union = candidates(probabilities.log(), torch.tensor([[[0, 1], [2, 1]]]), vocabulary_size=4)
    values = {int(i): union.logprobs[0, :, u].exp() for u, i in enumerate(union.ids[0]) if i >= 0}
    torch.testing.assert_close(values[0], torch.tensor([0.6, 0.05]))  # 0.1 left over two unseen tokens
    torch.testing.assert_close(values[1], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(values[2], torch.tensor([0.05, 0.5]))


def test_absent_candidates_never_appear():
    logprobs, ids = topk(3)
    logprobs[:, 0, 2:], ids[:, 0, 2:] = -torch.inf, -1
    union = candidates(logprobs, ids, VOCABULARY)
    for space in ("logprob", "prob"):
        fused = fuse(torch.full((3, 3), 1 / 3), union, space)
        assert not fused.isnan().any()
        torch.testing.assert_close(fused.exp().sum(1), torch.ones(3))
        assert (fused[union.ids < 0] == -torch.inf).all()


def test_token_slots():
    union = candidates(*topk(4), VOCABULARY)
    tokens = union.ids.amax(1)
    slots, listed = token_slots(union, tokens)
    assert listed.all()
    assert union.ids.gather(1, slots.unsqueeze(1)).squeeze(1).tolist() == tokens.tolist()
    assert not token_slots(union, torch.full((4,), VOCABULARY + 1))[1].any()
