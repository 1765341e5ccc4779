"""Truncated lists: how far the fused distribution is from fusion over the full vocabulary, and that the server computes
what the definition says. `python -m tests.bench.truncation` measures the whole table."""

from __future__ import annotations

import pytest
import torch

from server.launch.local import LocalDeployment
from server.policy import Policy, Uniform
from tests.support.oracle import truncated
from tests.support.oracle.huggingface import Reference
from tests.support.teacher_forcing import Texts, served

PROMPTS = 40
UNIFORM = [1 / 3] * 3
TOLERANCE = 1e-4
SPACES = ["logprob", "prob"]


@pytest.fixture(scope="module")
def texts(reference: Reference) -> Texts:
    return Texts(reference, PROMPTS)


@pytest.mark.parametrize("space", SPACES)
def test_lists_come_nearer_with_k(space: str, texts: Texts) -> None:
    full = truncated.combine(texts.logprobs, UNIFORM, space).softmax(-1)
    distance = {
        k: truncated.total_variation(truncated.fuse(texts.logprobs, k, UNIFORM, space), full) for k in (8, 32, 128)
    }
    means = {key: float(values.mean()) for key, values in distance.items()}
    print(f"\n{space}: {len(texts.prefixes)} positions, {means}")
    assert means[8] > means[32] > means[128]


@pytest.mark.parametrize("space", SPACES)
def test_the_server_computes_the_definition(space: str, texts: Texts, cramped: LocalDeployment) -> None:
    """Lists of 32."""
    policy: Policy = Uniform(space=space)
    found = served(cramped, texts, policy)
    expected = truncated.fuse(texts.logprobs, 32, UNIFORM, space)
    # Where the 32nd and 33rd candidate are equal to rounding, the two may list another one.
    off = truncated.total_variation(found, expected)
    print(f"\n{space}: largest total variation between served and expected {off.max():.2g}")
    assert off.max() < TOLERANCE


@pytest.mark.parametrize("space", SPACES)
def test_nothing_is_lost_with_the_whole_vocabulary(space: str, texts: Texts, whole: LocalDeployment) -> None:
    full = truncated.combine(texts.logprobs, UNIFORM, space).softmax(-1)
    off = truncated.total_variation(served(whole, texts, Uniform(space=space)), full)
    assert off.max() < TOLERANCE
    assert torch.isfinite(off).all()
