"""Lists much shorter than the vocabulary: what a sequence comes to is what the whole distributions come to, and whole
rows are asked for only where the lists leave it open."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import stats
from scipy.stats import entropy

from server.policy import Contrastive, Product, Select, Uniform, Weights
from server.request import SequenceRequest
from server.wire.stats import Stats
from tests.support.coordinator.alone import (
    HALF,
    Weigh,
    along,
    assert_alone,
    assert_details,
    expert_logprobs,
    generate,
    shares,
    truncate,
)
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import VOCABULARY, Behaviour, FakeEngine, FakeModel

TOLERANCE = 1e-3
ROUNDING = 1e-5


@dataclass(frozen=True)
class Agreeing(FakeModel):
    """Says nearly the same as all its like that have read the same. `scale`: how peaked its distributions are."""

    scale: float = 6.0

    def logits(self, tokens):
        shared = FakeModel(100, self.vocabulary).logits(tokens)
        return (self.scale * (shared + 0.05 * super().logits(tokens))).astype(np.float32)


def alike(rng: np.random.Generator, policy=None, **fields) -> SequenceRequest:
    """A request with the same prompt for both experts."""
    each = request(rng, (9, 9), policy, **fields)
    each.prompts[1][:] = each.prompts[0]
    return each


def engines_of(models) -> list[FakeEngine]:
    """That park."""
    return [FakeEngine(model, Behaviour(chunk=chunk)) for model, chunk in zip(models, (10, 16), strict=True)]


def product(said: dict[int, np.ndarray], step: int) -> dict[int, float]:
    return dict.fromkeys(said, 1.0)


# --- tokens ---

SAMPLING = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.5},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.9},
    {"repetition_penalty": 1.3, "presence_penalty": -0.7, "frequency_penalty": 0.4},
    {"repetition_penalty": 0.8, "presence_penalty": 0.7, "logit_bias": {5: 2.0, 6: -3.0}},
    {"logit_bias": {7: 100.0}},
    {"logit_bias": dict.fromkeys(range(0, VOCABULARY, 2), -100.0)},
    {"logit_bias": {3: 9.0, 5: 8.0}, "repetition_penalty": 1.4},
    {"logit_bias": {3: 9.0, 5: 8.0}, "repetition_penalty": 0.6},
    {"min_tokens": 8, "stop_token_ids": list(range(0, VOCABULARY, 3))},
    {"stop_token_ids": list(range(0, VOCABULARY, 3)), "repetition_penalty": 1.3},
    {"top_p": 0.3},
    {"top_k": 2},
    {"min_p": 0.4, "presence_penalty": 1.0},
    {"temperatures": [0.5, 2.0]},
]
FUSIONS: dict[str, tuple[object, Weigh, bool]] = {
    "logprob": (Uniform(), HALF, False),
    "prob": (Uniform("prob"), HALF, True),
    "product": (Product(), product, False),
    "signed": (Weights({"a": 1.5, "b": -0.5}), lambda said, step: {0: 1.5, 1: -0.5}, False),
    "uneven": (Weights({"a": 0.9, "b": 0.3}, space="prob"), shares([0.9, 0.3]), True),
}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_greedy_tokens_are_those_of_the_whole_distribution(tmp_path, rng, models, fusion):
    """Whatever is done to them before, over engines that park."""
    policy, weigh, prob = FUSIONS[fusion]
    with Deployment(tmp_path, engines_of(models), list_length=4) as deployment:
        requests = [request(rng, policy=policy, max_tokens=20, temperature=0.0, **fields) for fields in SAMPLING]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, weigh, prob_space=prob) for each in requests])
        assert deployment.stats().parked > 0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_selection_by_entropy_and_confidence_sees_the_whole_row(tmp_path, rng, models, length):
    def certain(said, step):
        best = min(said, key=lambda expert: entropy(np.exp(said[expert])))
        return {expert: float(expert == best) for expert in said}

    def confident(said, step):
        best = max(said, key=lambda expert: said[expert].max())
        return {expert: float(expert == best) for expert in said}

    with Deployment(tmp_path, engines_of(models), list_length=length) as deployment:
        by = {Select("entropy"): certain, Select("confidence"): confident}
        requests = [request(rng, policy=policy, temperature=0.0) for policy in by]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, by[each.policy]) for each in requests])


@pytest.mark.parametrize("plausibility", [0.0, 0.1, 0.6])
def test_contrastive_decoding_is_that_of_the_whole_rows(tmp_path, rng, models, plausibility):
    with Deployment(tmp_path, engines_of(models), list_length=3) as deployment:
        policy = Contrastive("a", "b", mu=0.6, plausibility=plausibility)
        requests = [request(rng, policy=policy, temperature=0.0) for _ in range(3)]
        deployment.run(*requests)
    for each in requests:
        tokens = deployment.tokens[each.id]
        for step, token in enumerate(tokens):
            leader, amateur = (expert_logprobs(each, models[index], index, tokens[:step]) for index in (0, 1))
            scores = np.where(np.exp(leader) >= plausibility * np.exp(leader.max()), leader - 0.6 * amateur, -np.inf)
            assert token == scores.argmax()


@pytest.mark.parametrize("prob", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.5, "logit_bias": {30: 1.0, 31: -1.0}},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 1.0, "repetition_penalty": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_first_tokens_follow_the_law_of_the_whole_distribution(tmp_path, rng, models, prob, fields):
    one = request(rng, (20, 20), Uniform("prob" if prob else "logprob"), max_tokens=1, **fields)
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=4) as deployment:
        tokens = first_tokens(deployment, one)
        assert 0 < deployment.stats().whole_rows["token"] <= len(tokens)
    assert_follows(tokens, law_after(one, along(one, models, HALF, [0], prob_space=prob)[0]))


@pytest.mark.parametrize("prob", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 1e-46},
        {"temperature": 1e-5},
        {"temperature": 1e-40, "top_p": 0.9},
        {"temperature": 1e-46, "min_p": 1.0},
        {"repetition_penalty": 1e-46, "logit_bias": {3: 50.0, 5: 51.0}, "temperature": 1e-40, "top_p": 0.5},
    ],
    ids=str,
)
def test_numbers_that_float32_does_not_hold_are_no_trouble(tmp_path, rng, models, prob, fields):
    """They all mean the most probable token."""
    policy = Uniform("prob" if prob else "logprob")
    with Deployment(tmp_path, engines_of(models), list_length=2) as deployment:
        requests = [request(rng, policy=policy, **fields) for _ in range(4)]
        deployment.run(*requests)
        greedy = [replace(each, sampling=replace(each.sampling, temperature=0.0)) for each in requests]
        assert_alone(deployment, requests, [generate(each, models, HALF, prob_space=prob) for each in greedy])


@pytest.mark.parametrize("prob", [False, True])
def test_they_do_where_lists_hold_all_tokens_but_not_all_that_is_known_of_them(tmp_path, rng, prob):
    """A penalty that is a reward makes more of what one expert has not listed."""
    models, size, length = [FakeModel(0, 8), FakeModel(1, 8)], 8, 5
    one = request(rng, (20, 20), Uniform("prob" if prob else "logprob"), max_tokens=1, repetition_penalty=0.5)
    said: list[np.ndarray] = []
    while len(set().union(*(np.argsort(-row)[:length].tolist() for row in said))) < size:
        one = replace(one, prompts=[rng.integers(0, 4, 5).tolist()] * 2)
        said = [model.logits(one.prompts[0]) for model in models]
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=length) as deployment:
        tokens = first_tokens(deployment, one)
    assert_follows(tokens, law_after(one, along(one, models, HALF, [0], prob_space=prob)[0]))


def first_tokens(deployment: Deployment, one: SequenceRequest) -> list[int]:
    """What comes of `one` with each of 1500 seeds."""
    again = [replace(one, id=100_000 + seed, sampling=replace(one.sampling, seed=seed)) for seed in range(1500)]
    for start in range(0, len(again), 100):
        deployment.run(*again[start : start + 100])
    return [deployment.tokens[each.id][0] for each in again]


def law_after(one: SequenceRequest, fused: np.ndarray) -> dict[int, float]:
    """What the first token is sampled from: token -> probability."""
    sampling = one.sampling
    scores = {token: float(value) + sampling.logit_bias.get(token, 0.0) for token, value in enumerate(fused)}
    for token in set().union(*one.prompts):
        scores[token] *= sampling.repetition_penalty
    return truncate(scores, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)


def assert_follows(tokens: list[int], law: dict[int, float]) -> None:
    """By a chi-square test, with what is expected less than five times in one cell."""
    assert set(tokens) <= set(law)
    counts = np.array([tokens.count(token) for token in law], np.float64)
    expected = len(tokens) * np.array(list(law.values()))
    rare = expected < 5
    counts, expected = (np.append(each[~rare], each[rare].sum() + 1e-9) for each in (counts, expected))
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("prob", [False, True])
def test_sampled_tokens_are_the_same_whatever_the_engines_do(tmp_path, rng, models, prob):
    """Though they do not do it in the same ticks: parked and preempted sequences, an engine that is lost and comes
    back."""
    requests = [
        request(rng, tuple(rng.integers(1, 40, 2)), Uniform("prob" if prob else "logprob"), max_tokens=20, **fields)
        for fields in SAMPLING[:12]
    ]
    found, troubled = [], [Behaviour(chunk=9), Behaviour(chunk=14, kv_tokens=160, fail_at=30)]
    for name, behaviours in (("plain", [Behaviour(), Behaviour()]), ("troubled", troubled)):
        (directory := tmp_path / name).mkdir()
        engines = [FakeEngine(model, behaviour) for model, behaviour in zip(models, behaviours, strict=True)]
        settings = {"list_length": 4, "on_expert_loss": "wait", "limits": {"kv_watermark": 0.0}}
        with Deployment(directory, engines, **settings) as deployment:
            deployment.submit(*requests)
            if behaviours is troubled:
                deployment.lose(1)
                deployment.start(1, FakeEngine(models[1], Behaviour(chunk=14, kv_tokens=160)))
            deployment.finish(*requests)
            found.append({each.id: deployment.tokens[each.id] for each in requests})
    assert found[0] == found[1]


# --- log-probabilities ---


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("length", [2, 6, 20])
def test_logprobs_are_those_of_the_whole_distribution(tmp_path, rng, models, fusion, length):
    """Ranks and alternatives too, however many; before bias, penalties and temperature."""
    policy, weigh, prob = FUSIONS[fusion]
    with Deployment(tmp_path, engines_of(models), list_length=length) as deployment:
        requests = [
            request(rng, policy=policy, top_logprobs=wanted, **fields)
            for wanted in (0, 2, 10)
            for fields in ({"temperature": 0.0}, {"temperature": 1.3, "logit_bias": {4: 3.0}, "top_p": 0.9})
        ]
        deployment.run(*requests)
    for each in requests:
        tokens, details = deployment.tokens[each.id], deployment.details[each.id]
        assert {len(detail.top) for detail in details} == {each.top_logprobs}
        laws = along(each, models, weigh, tokens, prob_space=prob)
        assert_details(details, tokens, laws, error=TOLERANCE + ROUNDING)


@pytest.mark.parametrize("tolerance", [1e-6, 0.03, 1.0])
def test_the_tolerance_is_kept(tmp_path, rng, tolerance):
    """And with more of it, fewer whole rows are asked for."""
    models = [Agreeing(0, scale=1.5), Agreeing(1, scale=1.5)]
    with Deployment(tmp_path, engines_of(models), list_length=12, tolerance=tolerance) as deployment:
        requests = [alike(rng, top_logprobs=1, max_tokens=20, temperature=0.0) for _ in range(4)]
        deployment.run(*requests)
        found = deployment.stats()
    for each in requests:
        tokens = deployment.tokens[each.id]
        laws = along(each, models, HALF, tokens)
        assert_details(deployment.details[each.id], tokens, laws, error=tolerance + ROUNDING)
    least = [0.0, *found.bound.bounds]
    assert not any(count for edge, count in zip(least, found.bound.counts, strict=True) if edge >= tolerance)
    asked = found.whole_rows["logprobs"]
    assert asked == 80 if tolerance < 1e-3 else asked < (80 if tolerance < 1 else 10)


# --- what is asked for ---


def bytes_of(stats: Stats) -> list[tuple[int, int]]:
    return [(expert.received_bytes["lists"], expert.received_bytes["rows"]) for expert in stats.experts]


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"temperature": 0.0, "top_logprobs": 0}, {"top_k": 1}], ids=str
)
def test_of_peaked_rows_none_is_asked_for(tmp_path, rng, fields):
    models = [Agreeing(0), Agreeing(1)]
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=24) as deployment:
        requests = [alike(rng, policy, max_tokens=20, **fields) for policy in (Uniform(), Uniform("prob"), Product())]
        deployment.run(*requests)
        found = deployment.stats()
    assert found.whole_rows == {"token": 0, "logprobs": 0}
    assert sum(found.bound.counts) == found.tokens == 60
    assert found.bound.sum <= 60 * TOLERANCE
    # 24 ids and 24 log-probabilities of 4 bytes for each token
    assert bytes_of(found) == [(60 * 24 * 8, 0)] * 2


def test_of_heavy_tailed_rows_all_are_where_logprobs_are_wanted(tmp_path, rng):
    models = [Agreeing(0, scale=0.6), Agreeing(1, scale=0.6)]
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=12) as deployment:
        wanted = [alike(rng, top_logprobs=0, max_tokens=20, temperature=0.0) for _ in range(2)]
        plain = [replace(each, id=50_000 + each.id, top_logprobs=None) for each in wanted]
        deployment.run(*plain)
        before = deployment.stats()
        deployment.run(*wanted)
        found = deployment.stats()
    assert [deployment.tokens[each.id] for each in wanted] == [deployment.tokens[each.id] for each in plain]
    token, logprobs = before.whole_rows["token"], found.whole_rows["logprobs"]
    assert before.whole_rows["logprobs"] == 0 and token < 20
    assert found.whole_rows["token"] == 2 * token and token + logprobs == 40
    assert sum(before.bound.counts) == before.tokens == 40 and before.bound.sum > 1
    assert sum(found.bound.counts) == found.tokens == 80
    assert found.bound.sum == pytest.approx(before.bound.sum)  # what is known whole adds nothing
    rows = sum(found.whole_rows.values())
    assert bytes_of(found) == [(80 * 12 * 8, 4 * VOCABULARY * rows)] * 2
    for each in wanted:
        tokens = deployment.tokens[each.id]
        assert_details(deployment.details[each.id], tokens, along(each, models, HALF, tokens), error=TOLERANCE)


def test_without_shared_memory_rows_come_through_the_socket(tmp_path, rng, models, monkeypatch):
    """As where a container hides the coordinator's process from the expert's."""
    monkeypatch.setattr("server.wire.shared_rows.RowMemory.path", "/proc/self/fd/999999")
    with Deployment(tmp_path, engines_of(models), list_length=3) as deployment:
        requests = [request(rng, temperature=0.0, top_logprobs=2) for _ in range(4)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        assert all(rows > 0 for _, rows in bytes_of(deployment.stats()))


def test_an_expert_without_weight_is_asked_nothing(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=3) as deployment:
        one = request(rng, policy=Weights({"a": 1.0, "b": 0.0}), top_logprobs=5, temperature=0.0)
        deployment.run(one)
        found = deployment.stats()
        alone = generate(one, models, lambda said, step: {0: 1.0})
        assert_alone(deployment, [one], [alone])
    assert found.whole_rows == {"token": 0, "logprobs": 12}
    assert [rows for _, rows in bytes_of(found)] == [4 * VOCABULARY * 12, 0]


def test_lists_of_the_whole_vocabulary_leave_nothing_to_ask(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models)) as deployment:
        policies = [policy for policy, _, _ in FUSIONS.values()] + [Contrastive("a", "b")]
        requests = [
            request(rng, policy=policy, top_logprobs=4, record=True, max_tokens=20, **fields)
            for policy in policies
            for fields in ({"temperature": 0.0}, {}, {"frequency_penalty": -0.5, "repetition_penalty": 0.9})
        ]
        deployment.run(*requests)
        found = deployment.stats()
    assert found.whole_rows == {"token": 0, "logprobs": 0}
    assert sum(found.bound.counts) == found.tokens == 20 * len(requests)
    assert found.bound.sum == pytest.approx(0, abs=1e-6)
