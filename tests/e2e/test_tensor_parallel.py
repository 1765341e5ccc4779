"""An expert over two ranks says what it says over one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.config import parse_config
from server.local import LocalDeployment
from server.policy import Single, Uniform
from tests.e2e import demo
from tests.e2e.requests import greedy

SHARED = Path("/dev/shm")
PROMPTS = [[257, 260, *text.encode(), 258, 261] for text in ("Add 27 and 58.", "Reverse stone.", "Hello!")]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core of its own")
def test_two_ranks_equal_one() -> None:
    split = {"math": {"tensor_parallel_size": 2}}
    data = demo.configuration(experts=["math", "text"], top_k=32, missing="exact", only=split)
    before = set(SHARED.glob("*cpushm*"))
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        both = [greedy([prompt, prompt], Uniform(), 16) for prompt in PROMPTS]
        alone = [greedy([prompt, []], Single("math"), 16, top_logprobs=4) for prompt in PROMPTS]
        parallel = deployment.generate([*both, *alone])
        assert [expert.up for expert in deployment.stats().experts] == [True, True]
    assert set(SHARED.glob("*cpushm*")) <= before
    data = demo.configuration(experts=["math", "text"], top_k=32, missing="exact")
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        single = deployment.generate([*both, *alone])
    for request in (*both, *alone):
        assert parallel[request.id].tokens == single[request.id].tokens
    for request in alone:
        for one, two in zip(single[request.id].choices, parallel[request.id].choices, strict=True):
            assert two.logprob == pytest.approx(one.logprob, abs=1e-4)
