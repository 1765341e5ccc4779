"""No tick waits for a compiler: what ticks of a deployment call is compiled before."""

from __future__ import annotations

import sys

import pytest
from numba.core.dispatcher import Dispatcher

from server.coordinator.warmup import warm_up
from server.policy import Contrastive, Select, Uniform, Weights
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import Behaviour, FakeEngine


def compiled() -> set[tuple[str, object]]:
    """(function, types of its arguments) of all that is compiled."""
    modules = [module for name, module in sys.modules.items() if name.startswith("server.coordinator.")]
    functions = {
        function for module in modules for function in vars(module).values() if isinstance(function, Dispatcher)
    }
    assert len(functions) > 10
    return {
        (function.py_func.__qualname__, signature)
        for function in functions
        for signature in function.nopython_signatures
    }


@pytest.mark.parametrize("missing", ["tail", "exact"])
def test_ticks_compile_nothing(tmp_path, rng, models, missing):
    warm_up()
    before = compiled()
    engines = [FakeEngine(models[0], Behaviour(chunk=5)), FakeEngine(models[1])]
    with Deployment(tmp_path, engines, missing=missing, top_k=5) as deployment:
        mixed = Weights({"a": 0.7, "b": 0.3}, space="prob")
        deployment.run(
            *(request(rng, policy=policy) for policy in (Uniform(), mixed, Select("entropy"), Contrastive("a", "b"))),
            request(rng, presence_penalty=0.5, logit_bias={3: 1.0}, top_p=0.9, top_k=3, top_logprobs=2, record=True),
            request(rng, lengths=(3, 4), given=[1, 2, 3], stop_token_ids=[0, 1]),
        )
    assert compiled() == before
