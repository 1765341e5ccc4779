"""Whatever the engines do (prefill at different speeds, preempt, report nonsense positions), every sequence comes to
what it comes to alone."""

from __future__ import annotations

import numpy as np
import pytest

from server.policy import Product, Single, Uniform, Weights
from server.request import SequenceRequest
from tests.support.coordinator.alone import HALF, along, assert_alone, assert_details, generate, shares
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import Behaviour, FakeEngine, FakeModel


def test_one_sequence_in_step(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models]) as deployment:
        one = request(rng, (7, 7), top_logprobs=3)
        deployment.run(one)
        alone = generate(one, models, HALF)
        assert_alone(deployment, [one], [alone])
        stats = deployment.stats()
    assert (stats.parked, stats.readded, stats.position_faults, stats.tokens) == (0, 0, 0, 12)
    details = deployment.details[one.id]
    np.testing.assert_allclose([detail.logprob for detail in details], alone.logprobs, atol=1e-4)
    for detail in details:
        assert detail.coefficients == [0.5, 0.5]
        assert len(detail.top) == 3
        assert detail.top == sorted(detail.top, key=lambda pair: -pair[1])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_different_prompts_and_chunked_prefill(tmp_path, rng, models, cache, temperature):
    """Each engine needs another number of steps for each prompt, so nearly everything is parked at first."""
    engines = [
        FakeEngine(model, Behaviour(chunk=chunk, cache=cache)) for model, chunk in zip(models, (7, 11), strict=True)
    ]
    with Deployment(tmp_path, engines) as deployment:
        requests = [request(rng, tuple(rng.integers(1, 50, 2)), temperature=temperature) for _ in range(12)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        stats = deployment.stats()
    assert stats.parked > 0 and stats.readded > 0 and stats.position_faults == 0
    assert stats.tokens == sum(len(tokens) for tokens in deployment.tokens.values())


def test_policies_and_participants_mix_in_one_batch(tmp_path, rng):
    models = [FakeModel(expert) for expert in range(3)]
    engines = [FakeEngine(model, Behaviour(chunk=16)) for model in models]
    cases = [
        (Uniform(), (5, 9, 3), shares([1 / 3] * 3), False),
        (Uniform("prob"), (9, 5, 6), shares([1 / 3] * 3), True),
        (Weights({"a": 0.7, "c": 0.3}), (4, 0, 8), shares([0.7, 0, 0.3]), False),
        (Product(), (3, 4, 5), lambda said, step: dict.fromkeys(said, 1.0), False),
        (Single("b"), (0, 12, 0), lambda said, step: {1: 1.0}, False),
    ] * 2
    with Deployment(tmp_path, engines) as deployment:
        requests = [request(rng, lengths, policy) for policy, lengths, _, _ in cases]
        deployment.run(*requests)
        expected = [
            generate(each, models, weigh, prob_space=prob)
            for each, (_, _, weigh, prob) in zip(requests, cases, strict=True)
        ]
        assert_alone(deployment, requests, expected)
    assert engines[1].peak < engines[0].peak


def test_preemption_in_one_engine(tmp_path, rng, models):
    """The second engine has a third of the KV cache that the sequences grow to; the first knows nothing of it."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(kv_tokens=160, chunk=32))]
    with Deployment(tmp_path, engines, limits={"kv_watermark": 0.0}) as deployment:
        requests = [request(rng, (20, 20), max_tokens=60) for _ in range(5)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        stats = deployment.stats()
    assert engines[1].preemptions > 0 and stats.experts[1].preemptions > 0
    assert engines[0].preemptions == 0
    assert stats.parked > 0


def test_many_requests_come_and_go(tmp_path, rng, models):
    """100 sequences of all kinds arrive and are aborted at random times, over engines of different speed and size."""
    engines = [
        FakeEngine(models[0], Behaviour(chunk=24, kv_tokens=512)),
        FakeEngine(models[1], Behaviour(chunk=40, kv_tokens=384, cache=False)),
    ]
    with Deployment(tmp_path, engines) as deployment:
        requests, aborted = [], set()
        for _ in range(100):
            lengths = tuple(rng.integers(1, 40, 2).tolist())
            each = request(rng, lengths, max_tokens=int(rng.integers(1, 20)), stop_token_ids=[3, 40])
            requests.append(each)
            deployment.submit(each)
            ticks = deployment.stats().ticks
            if rng.random() < 0.4:
                deployment.until_stats(lambda stats, ticks=ticks: stats.ticks > ticks or not stats.running)
            if rng.random() < 0.3:
                victim = requests[rng.integers(max(0, len(requests) - 8), len(requests))]
                aborted.add(victim.id)
                deployment.abort(victim.id)
        kept = [each for each in requests if each.id not in aborted]
        deployment.finish(*kept)
        assert_alone(deployment, kept, [generate(each, models, HALF) for each in kept])
        for each in requests:
            if each.id in aborted:
                alone = generate(each, models, HALF).tokens
                assert deployment.tokens[each.id] == alone[: len(deployment.tokens[each.id])]
        stats = deployment.until_stats(lambda stats: not any(expert.running for expert in stats.experts))
        assert (stats.running, stats.queued) == (0, 0)
        assert [expert.kv_used for expert in stats.experts] == [0, 0]
        assert sum(stats.finished.values()) == 100
    assert len(aborted) > 10 and stats.finished["abort"] > 0
    assert not engines[0].sequences and not engines[1].sequences


def test_rows_at_a_wrong_position_are_thrown_away(tmp_path, rng, models):
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(misplace=(3, 6)))]
    with Deployment(tmp_path, engines) as deployment:
        requests = [request(rng) for _ in range(3)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        stats = deployment.stats()
    assert stats.position_faults >= 2
    assert stats.parked > 0 and stats.readded >= stats.position_faults


@pytest.mark.parametrize("cache", [True, False])
def test_whole_rows_are_asked_of_parked_sequences_too(tmp_path, rng, models, cache):
    """With short lists, what they leave open is asked for: of rows that are at the rendezvous, and of rows that were
    parked steps ago. Greedy tokens, and all log-probabilities, are those of the whole distributions."""
    engines = [
        FakeEngine(model, Behaviour(chunk=chunk, cache=cache)) for model, chunk in zip(models, (9, 14), strict=True)
    ]
    with Deployment(tmp_path, engines, list_length=4) as deployment:
        requests = [
            request(
                rng,
                tuple(rng.integers(1, 40, 2)),
                top_logprobs=3,
                stop_token_ids=[index],
                logit_bias={30: 1.0},
                temperature=float(index % 2),
            )
            for index in range(10)
        ]
        deployment.run(*requests)
        greedy = requests[::2]
        assert_alone(deployment, greedy, [generate(each, models, HALF) for each in greedy])
        for each in requests:
            tokens = deployment.tokens[each.id]
            laws = along(each, models, HALF, tokens)
            assert_details(deployment.details[each.id], tokens, laws, error=1e-3 + 1e-5)
        stats = deployment.stats()
        assert stats.parked > 0 and sum(stats.whole_rows.values()) > 0


def test_a_sequence_gives_the_same_text_alone_and_in_a_batch(tmp_path, rng, models):
    engines = [FakeEngine(model, Behaviour(chunk=20)) for model in models]
    with Deployment(tmp_path, engines, list_length=4) as deployment:
        requests = [request(rng, tuple(rng.integers(1, 40, 2)), stop_token_ids=[index]) for index in range(8)]
        deployment.run(*requests)
        for each in requests:
            again = request(rng, (1, 1), stop_token_ids=each.stop_token_ids, seed=each.sampling.seed)
            again = SequenceRequest(again.id, each.prompts, each.policy, each.sampling, 12, 0, each.stop_token_ids)
            deployment.run(again)
            assert deployment.tokens[again.id] == deployment.tokens[each.id]
