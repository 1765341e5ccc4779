"""The gate's statistics: finite for every input, and equal to their definitions on a worked example."""

import math

import torch

from gate.features import feature_count, topk_features
from tests.support.gate_examples import EXPERTS, topk


def test_shape_and_finite_on_ordinary_lists():
    features = topk_features(*topk(5))
    assert features.shape == (5, feature_count(len(EXPERTS)))
    assert features.isfinite().all()


def test_finite_with_absent_candidates_and_experts():
    logprobs, ids = topk(4)
    logprobs[0, 0, 3:], ids[0, 0, 3:] = -torch.inf, -1  # a grammar left three tokens
    logprobs[1, 2], ids[1, 2] = -torch.inf, -1  # an expert is absent
    logprobs[2], ids[2] = -torch.inf, -1  # all are
    logprobs[3, :, 0], logprobs[3, :, 1:] = 0.0, -torch.inf  # one certain token
    ids[3, :, 1:] = -1
    assert topk_features(logprobs, ids).isfinite().all()


def test_values():
    probabilities = torch.tensor([[[0.5, 0.25], [0.7, 0.2]]])  # [1, E, K]
    ids = torch.tensor([[[4, 7], [7, 9]]])
    entropy, margin, tail, cross, agree = topk_features(probabilities.log(), ids)[0].split([2, 2, 2, 4, 4])
    expected = -sum(p * math.log(p) for p in (0.5, 0.25, 0.25))
    torch.testing.assert_close(entropy[0], torch.tensor(expected))
    torch.testing.assert_close(margin, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(tail, torch.tensor([0.25, 0.1]))
    torch.testing.assert_close(cross, torch.tensor([0.5, 0.25, 0.0, 0.7]))  # p_0(4) p_0(7) p_1(4) p_1(7)
    torch.testing.assert_close(agree, torch.tensor([1.0, 0.0, 0.0, 1.0]))
