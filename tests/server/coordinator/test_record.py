"""Sequences that ask for a record show what every expert gave at every token; the gate can be replaced between them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from gate.contract import Contract, vocabulary_hash
from gate.training.recording_gate import UniformGate, wrap
from server.policy import Contrastive, Gate, Product, Single, Uniform, Weights
from server.wire.api import GateLoaded, LoadGate, Recorded
from tests.support import demo
from tests.support.coordinator.alone import expert_logprobs
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import HIDDEN, VOCABULARY, Behaviour, FakeEngine

FUSIONS = [
    (Uniform(), [0.5, 0.5], False),
    (Uniform("prob"), [0.5, 0.5], True),
    (Product(), [1.0, 1.0], False),
    (Weights({"a": 1.5, "b": -0.5}), [1.5, -0.5], False),
    (Weights({"a": 0.9, "b": 0.4}, space="prob"), [0.9, 0.4], True),
    (Single("b"), [0.0, 1.0], False),
]
"""(policy, its coefficients, whether they weigh probabilities)."""


class Only(UniformGate):
    """All weight on one expert."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(
        self, topk_logprobs: torch.Tensor, topk_ids: torch.Tensor, projected: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        coefficients = torch.zeros([topk_ids.size(0), topk_ids.size(1)])
        coefficients[:, self.chosen] = 1.0
        return coefficients, state


class Identity:
    """What a recording gate projects."""

    def project(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def recording(path, experts, chosen, state_size=0, top_k=VOCABULARY):
    contract = Contract(
        format_version=1,
        experts=experts,
        vocabulary_hash=vocabulary_hash(demo.model("math") / "tokenizer.json"),
        top_k=top_k,
        space="logprob",
        inputs=["topk"],
        hidden_sizes=[],
        projected_size=0,
        state_size=state_size,
    )
    wrap(Only(chosen), contract, [HIDDEN] * len(experts), path)
    return path


def expect(model, tokens):
    """(ids by falling log-probability [V], log-probabilities [V]) of what follows `tokens`."""
    logprobs = log_softmax(model.logits(tokens).astype(np.float64))
    order = np.argsort(-logprobs, kind="stable")
    return order, logprobs[order]


@pytest.mark.parametrize("policy", [Uniform(), Single("b")])
def test_a_record_is_what_every_expert_said(tmp_path, rng, models, policy):
    """Also the experts that the policy does not use, along given tokens, and while one engine is short of memory."""
    engines = [FakeEngine(models[0], Behaviour(chunk=5)), FakeEngine(models[1], Behaviour(kv_tokens=96))]
    with Deployment(tmp_path, engines) as deployment:
        recorded = [request(rng, (9, 14), policy, max_tokens=6, record=True) for _ in range(3)]
        recorded.append(replace(request(rng, (4, 3), policy, max_tokens=5, record=True), given=[1, 2, 3, 4, 5]))
        plain = request(rng, (9, 14), policy, max_tokens=6)
        deployment.run(*recorded, plain)
    seen = {each.id: rows(deployment.records, each.id) for each in (*recorded, plain)}
    assert seen[plain.id] == []
    for each in recorded:
        tokens = deployment.tokens[each.id]
        assert len(seen[each.id]) == len(tokens)
        for at, (ids, logprobs, _) in enumerate(seen[each.id]):
            for expert, model in enumerate(models):
                wanted_ids, wanted = expect(model, each.prompts[expert] + tokens[:at])
                np.testing.assert_array_equal(ids[expert], wanted_ids)
                np.testing.assert_allclose(logprobs[expert], wanted, atol=1e-4)


@pytest.mark.parametrize("length", [1, 4, VOCABULARY])
@pytest.mark.parametrize(("policy", "weights", "prob"), FUSIONS)
def test_a_record_has_what_replays_the_law_that_the_token_was_sampled_from(
    tmp_path, rng, models, policy, weights, prob, length
):
    """Each expert's log-probability of the token, which it need not have listed, and the fused normaliser at the
    temperature."""
    engines = [FakeEngine(models[0], Behaviour(chunk=5)), FakeEngine(models[1])]
    with Deployment(tmp_path, engines, list_length=length) as deployment:
        asked = [
            request(rng, (9, 14), policy, max_tokens=6, record=True, top_logprobs=0, temperature=temperature)
            for temperature in (0.0, 0.6, 1.0, 1.7)
        ]
        given = request(rng, (4, 4), policy, max_tokens=6, record=True, top_logprobs=0, given=[1, 2, 3, 4])
        others = [request(rng, policy=policy, max_tokens=6, temperature=0.0) for _ in range(2)]
        deployment.run(*asked, given, *others)
    for each in (*asked, given):
        tokens, found = deployment.tokens[each.id], replayed(deployment.records, each.id)
        assert len(found) == len(tokens)
        for at, (token_logprobs, log_normaliser) in enumerate(found):
            said = [expert_logprobs(each, model, expert, tokens[:at]) for expert, model in enumerate(models)]
            np.testing.assert_allclose(token_logprobs, [row[tokens[at]] for row in said], atol=1e-4)
            scores = fused_scores(said, weights, prob) / (each.sampling.temperature or 1.0)
            assert log_normaliser == pytest.approx(logsumexp(scores), abs=1e-3 + 1e-4)


@pytest.mark.parametrize(("policy", "weights", "prob"), FUSIONS)
def test_a_record_without_logprobs_has_a_normaliser_too(tmp_path, rng, models, policy, weights, prob):
    """Some number in the middle of what the lists allow, also where the tokens are given, so that the lists need not
    settle anything; in prob space it is known."""
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=4) as deployment:
        sampled = [request(rng, (9, 9), policy, max_tokens=8, record=True) for _ in range(3)]
        given = [replace(each, id=each.id + 20_000, given=[1, 2, 3, 4, 5, 6, 7, 8]) for each in sampled]
        plain = request(rng, (9, 9), Contrastive("a", "b"), max_tokens=8)
        deployment.run(*sampled, *given, plain)
        found = deployment.stats()
    assert sum(found.bound.counts) == found.tokens
    for each in (*sampled, *given):
        tokens, known = deployment.tokens[each.id], replayed(deployment.records, each.id)
        assert len(known) == len(tokens) == 8
        for at, (token_logprobs, log_normaliser) in enumerate(known):
            said = [expert_logprobs(each, model, expert, tokens[:at]) for expert, model in enumerate(models)]
            np.testing.assert_allclose(token_logprobs, [row[tokens[at]] for row in said], atol=1e-4)
            assert np.isfinite(log_normaliser)
            if prob:
                assert log_normaliser == pytest.approx(np.log(sum(weights)), abs=1e-5)


def test_tracing_changes_nothing(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models]) as deployment:
        plain = request(rng, (9, 14), Single("a"), max_tokens=8)
        recorded = replace(plain, id=plain.id + 10_000, record=True)
        deployment.run(plain, recorded)
        assert deployment.tokens[plain.id] == deployment.tokens[recorded.id]


def test_a_recording_gate_shows_hidden_states_and_can_be_replaced(tmp_path, rng, models):
    first = recording(tmp_path / "first.pt", ["a", "b"], chosen=0)
    second = recording(tmp_path / "second.pt", ["a", "b"], chosen=1)
    (tmp_path / "a").symlink_to(demo.model("math"))
    engines = [FakeEngine(model, want_hidden=True) for model in models]
    with Deployment(tmp_path, engines, projector=Identity(), gate={"file": str(first)}) as deployment:
        before, after = (request(rng, (9, 9), Gate(), max_tokens=4, temperature=0.0, record=True) for _ in range(2))
        deployment.run(before)
        assert deployment.ask(LoadGate(str(second)), GateLoaded) == GateLoaded("")
        deployment.run(after)
    for sequence, leader in ((before, 0), (after, 1)):
        tokens = list(sequence.prompts[leader])
        for token, (_, _, projected) in zip(
            deployment.tokens[sequence.id], rows(deployment.records, sequence.id), strict=True
        ):
            np.testing.assert_allclose(projected[leader], models[leader].hidden(tokens), rtol=1e-5)
            assert token == models[leader].logits(tokens).argmax()
            tokens.append(token)


def test_a_gate_that_does_not_fit_is_not_loaded(tmp_path, rng, models):
    first = recording(tmp_path / "first.pt", ["a", "b"], chosen=0)
    (tmp_path / "a").symlink_to(demo.model("math"))
    engines = [FakeEngine(model, want_hidden=True) for model in models]
    with Deployment(tmp_path, engines, projector=Identity(), gate={"file": str(first)}) as deployment:
        for path, words in (
            (tmp_path / "absent.pt", "no gate checkpoint"),
            (recording(tmp_path / "names.pt", ["b", "a"], chosen=0), "experts: the gate expects"),
            (recording(tmp_path / "state.pt", ["a", "b"], chosen=0, state_size=3), "state_size is 3"),
        ):
            assert words in deployment.ask(LoadGate(str(path)), GateLoaded).problem
        deployment.run(request(rng, (9, 9), Gate(), max_tokens=4))


def test_a_gate_may_read_more_or_less_than_the_configured_lists(tmp_path, rng, models):
    """More: the experts list as many as it reads. Records hold what it reads."""
    (tmp_path / "a").symlink_to(demo.model("math"))
    for top_k in (3, 9):
        gate = recording(tmp_path / f"{top_k}.pt", ["a", "b"], chosen=0, top_k=top_k)
        engines = [FakeEngine(model, want_hidden=True) for model in models]
        settings = {"gate": {"file": str(gate)}, "list_length": 6}
        with Deployment(tmp_path, engines, projector=Identity(), **settings) as deployment:
            one = request(rng, (9, 9), Gate(), max_tokens=4, record=True)
            deployment.run(one)
            for longer in (9, 10):
                gate = recording(tmp_path / f"longer-{longer}.pt", ["a", "b"], chosen=0, top_k=longer)
                problem = deployment.ask(LoadGate(str(gate)), GateLoaded).problem
                assert problem == ("" if longer <= top_k else problem_of(gate, longer, max(6, top_k)))
        for ids, logprobs, _ in rows(deployment.records, one.id):
            assert ids.shape == logprobs.shape == (2, top_k)
        for at, (ids, _, _) in enumerate(rows(deployment.records, one.id)):
            wanted, _ = expect(models[1], one.prompts[1] + deployment.tokens[one.id][:at])
            np.testing.assert_array_equal(ids[1], wanted[:top_k])


def problem_of(gate, top_k, listed):
    return f"gate {gate.name}: top_k is {top_k}, experts list {listed} log-probabilities"


def test_without_a_gate_none_is_loaded(tmp_path, models):
    path = recording(tmp_path / "first.pt", ["a", "b"], chosen=0)
    with Deployment(tmp_path, [FakeEngine(model) for model in models]) as deployment:
        assert "without a gate" in deployment.ask(LoadGate(str(path)), GateLoaded).problem


def fused_scores(said: list[np.ndarray], weights: list[float], prob: bool) -> np.ndarray:
    """float64[V], not normalised."""
    if prob:
        return np.log(sum(weight * np.exp(row) for row, weight in zip(said, weights, strict=True)))
    return np.asarray(sum(weight * row for row, weight in zip(said, weights, strict=True)))


def replayed(records: list[Recorded], sequence: int) -> list[tuple[np.ndarray, float]]:
    """(log-probabilities of the token [E], log of the normaliser) at each token of one sequence."""
    found = []
    for record in records:
        if sequence in record.sequences:
            row, count = record.sequences.index(sequence), len(record.sequences)
            token_logprobs = np.frombuffer(record.token_logprobs, np.float32).reshape(count, 2)[row]
            found.append((token_logprobs, float(np.frombuffer(record.log_normaliser, np.float32)[row])))
    return found


def rows(records: list[Recorded], sequence: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids [E, K], log-probabilities [E, K], projected [E, d]) of each token of one sequence."""
    found = []
    for record in records:
        if sequence in record.sequences:
            row, count = record.sequences.index(sequence), len(record.sequences)
            arrays = [
                np.frombuffer(data, kind).reshape(count, 2, -1)[row]
                for data, kind in (
                    (record.ids, np.int32),
                    (record.logprobs, np.float32),
                    (record.projected, np.float32),
                )
            ]
            found.append(tuple(arrays))
    return found
