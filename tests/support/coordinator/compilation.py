"""What a coordinator's ticks compile, seen in a process that has compiled nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numba.core.dispatcher import Dispatcher

from server.coordinator.warmup import warm_up
from server.policy import Contrastive, Select, Uniform, Weights
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import Behaviour, FakeEngine, FakeModel


def compiled_in_ticks(directory: Path) -> list[str]:
    """The functions that were compiled, for some types, while a deployment with all kinds of requests ran, after the
    warm-up. To be called in a process of its own."""
    warm_up()
    before = _compiled()
    _run(directory)
    return sorted({name for name, _ in _compiled() - before})


def _run(directory: Path) -> None:
    rng = np.random.default_rng(0)
    engines = [FakeEngine(FakeModel(0), Behaviour(chunk=5)), FakeEngine(FakeModel(1))]
    with Deployment(directory, engines, list_length=5) as deployment:
        mixed = Weights({"a": 0.7, "b": 0.3}, space="prob")
        deployment.run(
            *(request(rng, policy=policy) for policy in (Uniform(), mixed, Select("entropy"), Contrastive("a", "b"))),
            request(rng, presence_penalty=0.5, logit_bias={3: 1.0}, top_p=0.9, top_k=3, top_logprobs=2, record=True),
            request(rng, lengths=(3, 4), given=[1, 2, 3], stop_token_ids=[0, 1]),
            request(rng, policy=mixed, temperature=1.5, min_p=0.1, repetition_penalty=1.3, min_tokens=3),
            request(rng, policy=mixed, temperature=0.0, frequency_penalty=-0.5, top_logprobs=0, record=True),
        )


def _compiled() -> set[tuple[str, object]]:
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
