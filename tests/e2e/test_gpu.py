"""The same path with engines on a GPU: two experts on the first device, against transformers on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.config import parse_config
from server.local import LocalDeployment
from server.policy import Policy, Uniform
from tests.e2e import demo
from tests.e2e.requests import greedy
from tests.oracle import rules
from tests.oracle.compare import compare
from tests.oracle.reference import Reference

pytestmark = pytest.mark.gpu

EXPERTS = ["math", "text"]
PROMPTS = 32
TOKENS = 32
TIE = 1e-2  # another device's float32 products, added in another order


@pytest.fixture(scope="module")
def deployment() -> Iterator[LocalDeployment]:
    data = demo.configuration(
        experts=EXPERTS, top_k=demo.VOCABULARY, expert={"device": "cuda", "gpus": [0], "kv_cache_memory": "256MiB"}
    )
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def pair() -> Reference:
    return Reference([demo.model(name) for name in EXPERTS])


@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_greedy_tokens_equal_transformers(space: str, deployment: LocalDeployment, pair: Reference) -> None:
    prompts = [[pair.encode(messages)] * 2 for messages in demo.conversations(PROMPTS)]
    policy: Policy = Uniform(space=space)
    requests = [greedy(row, policy, TOKENS) for row in prompts]
    results = deployment.generate(requests)
    rule = rules.log_linear([0.5, 0.5]) if space == "logprob" else rules.linear([0.5, 0.5])
    result = compare([results[request.id].tokens for request in requests], pair.decode(prompts, rule, TOKENS), tie=TIE)
    assert not result.wrong
    assert result.equal > 0.9 * PROMPTS * TOKENS
