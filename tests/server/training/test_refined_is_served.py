"""Refinement learns from the law that sampled: its log-probabilities are those of the deployment, over lists that hold
little of a large vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from gate.contract import Contract, vocabulary_hash
from gate.model import GateModel
from gate.training.dataset import from_responses
from gate.training.objective import gate_coefficients, served_law
from gate.training.recording_gate import wrap
from server.policy import Gate
from server.training.recorder import to_response
from server.training.rollout import Rollout, Rollouts, Task
from tests.support import demo
from tests.support.coordinator.harness import Deployment
from tests.support.fake_engine import HIDDEN, FakeEngine, FakeModel

VOCABULARY = 3000
LISTED = 64
READ = 20
SIZES = [HIDDEN, HIDDEN]
TOLERANCE = 1e-3
MODELS = [FakeModel(0, VOCABULARY), FakeModel(1, VOCABULARY)]


class Raw:
    """What a recording gate projects."""

    def project(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def made_contract(space: str) -> Contract:
    return Contract(
        format_version=1,
        experts=["a", "b"],
        vocabulary_hash=vocabulary_hash(demo.model("math") / "tokenizer.json"),
        top_k=READ,
        space=space,
        inputs=["topk", "hidden"],
        hidden_sizes=SIZES,
        projected_size=3,
        state_size=2,
    )


def rollouts(deployment: Deployment, temperature: float) -> list[Rollout]:
    """Twelve of ten tokens, by the gate."""
    stand_in = SimpleNamespace(
        submit=lambda requests: deployment.submit(*requests), receive=deployment.receive, check=lambda: None
    )
    tasks = [Task(n, [[1, n], [2, n, 3]], Gate(), temperature, seed=n, keep_law=True) for n in range(12)]
    made = Rollouts(stand_in, stop_token_ids=[], max_tokens=10, in_flight=8).run(tasks)
    return sorted(made, key=lambda rollout: rollout.task.number)


def whole(rollout: Rollout, space: str) -> np.ndarray:
    """Fused scores float64[T, V] over the whole vocabulary, by the coefficients that sampled."""
    tokens, said = rollout.tokens.tolist(), []
    for model, prompt in zip(MODELS, rollout.task.prompts, strict=True):
        rows = np.array([model.logits(prompt + tokens[:at]) for at in range(len(tokens))], np.float64)
        said.append(log_softmax(rows, axis=1))
    weights, logprobs = rollout.law.coefficients.astype(np.float64)[:, :, None], np.stack(said, axis=1)
    if space == "logprob":
        return (weights * logprobs).sum(1)
    return logsumexp(logprobs, b=weights, axis=1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.4])
@pytest.mark.parametrize("space", ["logprob", "prob"])
def test_old_log_probabilities_are_those_of_the_law_that_sampled(tmp_path, space, temperature):
    torch.manual_seed(0)
    contract = made_contract(space)
    model = GateModel(contract)
    wrap(model, contract, SIZES, tmp_path / "gate.pt")
    (tmp_path / "a").symlink_to(demo.model("math"))
    engines = [FakeEngine(each, want_hidden=True) for each in MODELS]
    settings = {"gate": {"file": "gate.pt"}, "list_length": LISTED, "tolerance": TOLERANCE}
    with Deployment(tmp_path, engines, projector=Raw(), **settings) as deployment:
        made = rollouts(deployment, temperature)
        reported = np.concatenate([[each.logprob for each in deployment.details[n + 1]] for n in range(len(made))])
    records = from_responses(VOCABULARY, [to_response(each, 0, "p", 0, 0.0, SIZES) for each in made])
    batch = records.batch(torch.arange(len(made)), torch.device("cpu"))
    law = served_law(batch, batch.served, space, temperature)
    old, mask = law.token_logprobs(batch.served.coefficients)

    scores = np.concatenate([whole(each, space) for each in made])
    tokens = np.concatenate([each.tokens for each in made])
    true = log_softmax(scores / temperature, axis=1)[np.arange(len(tokens)), tokens]
    assert mask.all()
    np.testing.assert_allclose(old.flatten(), true, atol=1.1 * TOLERANCE)
    if temperature == 1.0:
        np.testing.assert_allclose(old.flatten(), reported, atol=1e-5)
    unlisted = ~(batch.topk_ids == batch.tokens[:, None, None]).flatten(1).any(1)
    assert unlisted.sum() > 10
    again = gate_coefficients(model, batch)  # from hidden states in half precision
    torch.testing.assert_close(again, batch.served.coefficients, atol=2e-3, rtol=0)
