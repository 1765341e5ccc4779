"""What the gate is shown, what it remembers, and what happens where it misbehaves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from gate.checkpoint import save
from gate.training.recording_gate import uniform_gate
from server.coordinator.gate_runner import GateRunner
from server.policy import FusionRoute, Select
from server.policy import Gate as GatePolicy
from server.request import FinishReason
from tests.support.coordinator.alone import HALF, assert_alone, expert_logprobs, generate
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import HIDDEN, VOCABULARY, Behaviour, FakeEngine, FakeModel


class GateStandIn:
    """A checkpoint whose coefficients depend on everything a gate is given, and on how often it was asked before."""

    contract = SimpleNamespace(space="logprob", top_k=VOCABULARY, projected_size=2, state_size=1)

    def __init__(self) -> None:
        self.trouble = ""
        self.shown: list[torch.Tensor] = []  # projections [B, E, d]

    def project(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, expert : expert + 2]

    def forward(self, logprobs, ids, projected, state):
        rows, experts, _ = logprobs.shape
        self.shown.append(projected.clone())
        if self.trouble == "raises":
            raise RuntimeError("no")
        if self.trouble == "shape":
            return torch.ones(rows, experts + 1), state
        if self.trouble == "state":
            return torch.ones(rows, experts), state[:, :0]
        scores = logprobs[:, :, 0] + (ids[:, :, 0] % 3) + projected.sum(-1) + 0.1 * state * torch.arange(experts)
        if self.trouble == "nan":
            scores = torch.full_like(scores, float("nan"))
        return scores.softmax(-1), state + 1

    def reference(self, models: list[FakeModel], each):
        """The same in NumPy, from the history."""

        def weigh(said, step):
            scores = []
            for expert, logprobs in said.items():
                best = int(logprobs.argmax())
                history = each.prompts[expert] + self.so_far(each, models, step)
                hidden = models[expert].hidden(history)[expert : expert + 2]
                scores.append(logprobs[best] + best % 3 + hidden.sum() + 0.1 * step * expert)
            return dict(zip(said, softmax(scores).tolist(), strict=True))

        return weigh

    def so_far(self, each, models, step):
        return self.tokens[each.id][:step]


class BrokenEngine(FakeEngine):
    """Where its logits are NaN, the hidden states that they came from are too."""

    def _rows(self, due):
        rows = super()._rows(due)
        rows.hidden[rows.logits.isnan().any(dim=1)] = float("nan")
        return rows


@pytest.fixture
def gate(monkeypatch, tmp_path) -> GateStandIn:
    stand_in = GateStandIn()
    save(*uniform_gate(["a", "b"], "", VOCABULARY), tmp_path / "gate.pt")  # workers read its contract
    monkeypatch.setattr("server.coordinator.process.load_gate", lambda *args, **kwargs: GateRunner(stand_in))
    monkeypatch.setattr("server.coordinator.process.vocabulary_hash", lambda path: "")
    return stand_in


def gated(tmp_path, models, gate, on_failure="uniform") -> Deployment:
    engines = [
        FakeEngine(model, Behaviour(chunk=chunk), want_hidden=True)
        for model, chunk in zip(models, (9, 14), strict=True)
    ]
    settings = {"file": "gate.pt", "on_failure": on_failure}
    return Deployment(tmp_path, engines, projector=gate, gate=settings, limits={"sequences": 3})


def test_the_gate_sees_all_it_should_and_remembers(tmp_path, rng, models, gate):
    """Whatever is parked and added again: the state moves on once a token, hidden states are the right rows', and a
    sequence that takes over a slot starts afresh."""
    with gated(tmp_path, models, gate) as deployment:
        requests = [request(rng, tuple(rng.integers(2, 30, 2)), GatePolicy(), expert_weights=True) for _ in range(6)]
        deployment.run(*requests)
        gate.tokens = deployment.tokens
        for each in requests:
            alone = generate(each, models, gate.reference(models, each))
            assert deployment.tokens[each.id] == alone.tokens
        assert HIDDEN > 2 and deployment.stats().parked > 0


def test_its_state_moves_on_once_though_a_row_is_fused_again(tmp_path, rng, models, gate):
    """An expert dies of a question about rows that the gate has seen: they come again once it is back."""
    save(*uniform_gate(["a", "b"], "", 4), tmp_path / "gate.pt")  # that lists are as short
    engines = [FakeEngine(model, want_hidden=True) for model in models]
    settings = {"gate": {"file": "gate.pt"}, "list_length": 4, "on_expert_loss": "wait", "unanswered": {1: 4}}
    with Deployment(tmp_path, engines, projector=gate, **settings) as deployment:
        one = request(rng, policy=GatePolicy(), temperature=0.0, top_logprobs=1)
        deployment.submit(one)
        deployment.lose(1)
        deployment.start(1, FakeEngine(models[1], want_hidden=True))
        deployment.finish(one)
        gate.tokens = deployment.tokens
        weigh, tokens = gate.reference(models, one), deployment.tokens[one.id]
        assert len(gate.shown) == one.max_tokens + 1
        for step, details in enumerate(deployment.details[one.id]):
            said = {expert: expert_logprobs(one, model, expert, tokens[:step]) for expert, model in enumerate(models)}
            assert details.coefficients == pytest.approx(list(weigh(said, step).values()), abs=1e-5)


def test_policies_that_select_by_the_gate(tmp_path, rng, models, gate):
    with gated(tmp_path, models, gate) as deployment:
        selected, routed = request(rng, (9, 9), Select("gate")), request(rng, (9, 9), FusionRoute("a"))
        deployment.run(selected, routed)
        gate.tokens = deployment.tokens
        weigh = gate.reference(models, selected)

        def select(said, step):
            weights = weigh(said, step)
            return {expert: float(weights[expert] == max(weights.values())) for expert in said}

        expected = [generate(selected, models, select), generate(routed, models, lambda said, step: {0: 1.0, 1: 1.0})]
        assert_alone(deployment, [selected, routed], expected)


@pytest.mark.parametrize("trouble", ["raises", "shape", "state", "nan"])
def test_a_gate_that_fails_gives_way_to_uniform_weights(tmp_path, rng, models, gate, trouble):
    with gated(tmp_path, models, gate) as deployment:
        gate.trouble = trouble
        one = request(rng, policy=GatePolicy())
        deployment.run(one)
        assert_alone(deployment, [one], [generate(one, models, HALF)])
        assert deployment.stats().gate_failures == len(deployment.tokens[one.id])


def test_a_gate_that_fails_fails_the_requests_that_ask_it(tmp_path, rng, models, gate):
    with gated(tmp_path, models, gate, on_failure="fail") as deployment:
        gate.trouble = "raises"
        asks, does_not = request(rng, policy=GatePolicy()), request(rng)
        deployment.run(asks, does_not)
        ended = deployment.ended[asks.id]
        assert (ended.reason, ended.message) == (FinishReason.ERROR, "the gate failed")
        assert_alone(deployment, [does_not], [generate(does_not, models, HALF)])
        gate.trouble = ""
        again = request(rng, policy=GatePolicy())
        deployment.run(again)
        assert deployment.ended[again.id].reason is FinishReason.LENGTH


def test_the_gate_and_records_show_nothing_of_a_row_that_is_rubbish(tmp_path, rng, models, gate):
    broken = BrokenEngine(models[1], Behaviour(nan=lambda tokens: len(tokens) % 4 == 0), want_hidden=True)
    engines = [FakeEngine(models[0], want_hidden=True), broken]
    with Deployment(tmp_path, engines, projector=gate, gate={"file": "gate.pt", "on_failure": "fail"}) as deployment:
        one = request(rng, (7, 9), GatePolicy(), record=True)
        deployment.run(one)
        gate.tokens = deployment.tokens
        gone = [(9 + step) % 4 == 0 for step in range(one.max_tokens)]
        alone = generate(one, models, gate.reference(models, one), gone=lambda expert, step: expert and gone[step])
        assert_alone(deployment, [one], [alone])
        recorded = [np.frombuffer(record.projected, np.float32).reshape(2, 2) for record in deployment.records]
        assert [not projected[1].any() for projected in recorded] == gone
        assert deployment.stats().gate_failures == 0


def test_the_gate_is_shown_nothing_of_a_lost_expert(tmp_path, rng, models, gate):
    engines = [FakeEngine(models[0], want_hidden=True), FakeEngine(models[1], Behaviour(fail_at=5), want_hidden=True)]
    settings = {"gate": {"file": "gate.pt"}, "on_expert_loss": "degrade"}
    with Deployment(tmp_path, engines, projector=gate, **settings) as deployment:
        one = request(rng, policy=GatePolicy())
        deployment.submit(one)
        deployment.lose(1)
        deployment.finish(one)
        assert [bool(projected[0, 1].any()) for projected in gate.shown] == [step < 4 for step in range(one.max_tokens)]
        assert all(projected[0, 0].all() for projected in gate.shown)
