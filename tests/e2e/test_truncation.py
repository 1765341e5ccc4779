"""Lists cut short lose nothing: what the server reports is fusion over the whole vocabulary, by transformers, with
lists of 32 of 264 tokens as with lists of all. `python -m tests.bench.exactness` measures it at real vocabularies."""

from __future__ import annotations

import pytest
import torch

from server.launch.local import LocalDeployment
from server.policy import Policy, Uniform
from tests.support.oracle import fusion
from tests.support.oracle.huggingface import Reference
from tests.support.sequences import greedy
from tests.support.teacher_forcing import Texts, served

PROMPTS = 40
UNIFORM = [1 / 3] * 3
ROUNDING = 1e-4
TOLERANCE = 1e-3
SPACES = ["logprob", "prob"]


@pytest.fixture(scope="module")
def texts(reference: Reference) -> Texts:
    return Texts(reference, PROMPTS)


@pytest.mark.parametrize("space", SPACES)
def test_nothing_is_lost_with_the_whole_vocabulary(space: str, texts: Texts, whole: LocalDeployment) -> None:
    before = _whole_rows(whole)
    off = _distance(whole, texts, Uniform(space=space))
    assert off.max() < ROUNDING
    assert torch.isfinite(off).all()
    assert _whole_rows(whole) == before


@pytest.mark.parametrize("space", SPACES)
def test_nothing_is_lost_with_short_lists(space: str, texts: Texts, cramped: LocalDeployment) -> None:
    """More alternatives are asked for than lists hold, so that each row must be known whole."""
    before = _whole_rows(cramped)
    assert _distance(cramped, texts, Uniform(space=space)).max() < ROUNDING
    assert _whole_rows(cramped) - before == len(texts.prefixes)


@pytest.mark.parametrize("space", SPACES)
def test_what_lists_settle_is_within_the_tolerance(space: str, texts: Texts, cramped: LocalDeployment) -> None:
    full = fusion.combine(texts.logprobs, UNIFORM, space).log_softmax(-1)
    before = _whole_rows(cramped)
    requests = [greedy([prefix] * 3, Uniform(space=space), 1, top_logprobs=2) for prefix in texts.prefixes]
    results = cramped.generate(requests)
    for request, expected in zip(requests, full, strict=True):
        details = results[request.id].details[0]
        best = expected.topk(2).values
        assert details.logprob == pytest.approx(float(best[0]), abs=TOLERANCE + ROUNDING)
        assert [value for _, value in details.top] == pytest.approx(best.tolist(), abs=TOLERANCE + ROUNDING)
    assert 0 < _whole_rows(cramped) - before < len(requests)


def _whole_rows(deployment: LocalDeployment) -> int:
    """Tokens so far for which rows had to be known whole."""
    return sum(deployment.stats().whole_rows.values())


def _distance(deployment: LocalDeployment, texts: Texts, policy: Policy) -> torch.Tensor:
    """Total variation float64[N] between served and full fusion."""
    assert isinstance(policy, Uniform)
    full = fusion.combine(texts.logprobs, UNIFORM, policy.space).softmax(-1)
    return fusion.total_variation(served(deployment, texts, policy), full)
