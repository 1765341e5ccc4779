"""Responses through a deployment whose experts fail, without one: the end is one line, and nothing waits for ever."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from server.config import parse_config
from server.errors import EngineError
from server.launch.local import LocalDeployment
from server.policy import Uniform
from server.request import FinishReason
from server.training.rollout import Rollouts, Task
from server.wire.api import Ended, Recorded
from server.wire.supervisor import RestartExpert


def test_a_tick_in_which_all_experts_failed_ends_with_their_words():
    messages = [Recorded([], b"", b"", b"", b"", b""), Ended(1, FinishReason.ERROR, message="no usable probabilities")]
    deployment = SimpleNamespace(submit=lambda requests: None, receive=lambda timeout: messages.pop(0))
    rollouts = Rollouts(deployment, stop_token_ids=[0], max_tokens=4, in_flight=2)
    with pytest.raises(EngineError, match="no usable probabilities"):
        list(rollouts.run([Task(0, [[1], [1]], Uniform())]))


def test_an_expert_that_hangs_ends_it():
    """Nobody replaces it: there is no supervisor."""
    config = parse_config({"name": "fake", "experts": [{"name": "a", "model": "a"}]}, directory=Path())
    deployment = LocalDeployment(config)
    deployment._control = SimpleNamespace(drain=lambda: [RestartExpert(0, 0, "no answer for 60 s")])
    with pytest.raises(EngineError, match=r"^expert a: no answer for 60 s$"):
        deployment.check()
