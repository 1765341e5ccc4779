"""From submission to the one terminal message: queue, admission, ends, aborts, policies that wait, shutting down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from server.policy import Perplexity
from server.request import MAX_PRIORITY, FinishReason
from tests.support.coordinator.alone import HALF, assert_alone, cross_entropy, generate, shares
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import Behaviour, FakeEngine


def engines_of(models, **behaviour) -> list[FakeEngine]:
    return [FakeEngine(model, Behaviour(**behaviour)) for model in models]


def held(models, **behaviour) -> list[FakeEngine]:
    """Engines that wait in their first step until they are released."""
    engines = engines_of(models, **behaviour)
    for engine in engines:
        engine.behaviour.hold.clear()
    return engines


def release(engines) -> None:
    for engine in engines:
        engine.behaviour.hold.set()


# --- admission ---


def test_a_full_queue_refuses_all_or_none(tmp_path, rng, models):
    engines = held(models)
    with Deployment(tmp_path, engines, limits={"sequences": 1, "queue": 2}) as deployment:
        running = request(rng)
        deployment.submit(running)
        deployment.until_stats(lambda stats: stats.running == 1)
        too_many = [request(rng) for _ in range(3)]
        deployment.run(*too_many)
        waiting = [request(rng), request(rng)]
        deployment.submit(*waiting)
        one_more = request(rng)
        deployment.run(one_more)
        for refused in (*too_many, one_more):
            ended = deployment.ended[refused.id]
            assert (ended.reason, ended.code) == (FinishReason.ERROR, "overloaded")
            assert not deployment.tokens[refused.id]
        assert deployment.stats().queued == 2
        release(engines)
        deployment.finish(running, *waiting)
        assert_alone(deployment, [running, *waiting], [generate(each, models, HALF) for each in (running, *waiting)])


def test_a_prompt_that_never_fits_is_refused_with_its_companions(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models, kv_tokens=64)) as deployment:
        fitting, too_long, empty = request(rng), request(rng, (5, 64)), request(rng, (5, 0))
        deployment.run(fitting, too_long)
        deployment.run(empty)
        for refused in (fitting, too_long, empty):
            assert (deployment.ended[refused.id].reason, deployment.ended[refused.id].code) == ("error", "too_long")
        assert "too long" in deployment.ended[fitting.id].message
        assert "empty" in deployment.ended[empty.id].message


@pytest.mark.parametrize("room", [{"kv_tokens": 64}, {"max_model_len": 64}], ids=str)
def test_generation_ends_where_an_engine_has_no_more_room(tmp_path, rng, models, room):
    with Deployment(tmp_path, engines_of(models, **room)) as deployment:
        one = request(rng, (8, 57), max_tokens=1000)
        deployment.run(one)
        assert_alone(deployment, [one], [generate(one, models, HALF, max_tokens=64 - 57)])


def test_kv_admission_holds_sequences_back(tmp_path, rng, models):
    """Two blocks of 16 each, and the cache has four: a second sequence waits, so nothing is preempted."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(kv_tokens=64))]
    with Deployment(tmp_path, engines, limits={"kv_watermark": 0.05}) as deployment:
        requests = [request(rng, (5, 30), max_tokens=2) for _ in range(4)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
    assert [engine.peak for engine in engines] == [1, 1]
    assert engines[1].preemptions == 0


def test_slots_bound_what_runs_at_once(tmp_path, rng, models):
    engines = engines_of(models)
    with Deployment(tmp_path, engines, limits={"sequences": 3}) as deployment:
        requests = [request(rng, max_tokens=int(rng.integers(1, 9))) for _ in range(12)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
    assert [engine.peak for engine in engines] == [3, 3]


def test_priority_comes_before_arrival(tmp_path, rng, models):
    engines = held(models)
    with Deployment(tmp_path, engines, limits={"sequences": 1}) as deployment:
        first = request(rng, max_tokens=3)
        deployment.submit(first)
        deployment.until_stats(lambda stats: stats.running == 1)
        late, normal, second, urgent = (request(rng, max_tokens=3, priority=number) for number in (5, 0, 0, -1))
        deployment.submit(late, normal, second, urgent)
        deployment.until_stats(lambda stats: stats.queued == 4)
        release(engines)
        deployment.finish(first, late, normal, second, urgent)
        order = [each.id for each in (first, urgent, normal, second, late)]
        assert list(deployment.ended) == order


def test_the_largest_priorities_are_numbers_like_others(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models)) as deployment:
        deployment.run(*(request(rng, max_tokens=2, priority=number) for number in (MAX_PRIORITY, -MAX_PRIORITY)))
        assert [ended.reason for ended in deployment.ended.values()] == [FinishReason.LENGTH] * 2


# --- ends ---


def test_stop_tokens_min_tokens_and_length(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models)) as deployment:
        free = [request(rng, max_tokens=20, temperature=0.0) for _ in range(6)]
        deployment.run(*free)
        requests = []
        for index, each in enumerate(free):
            tokens = deployment.tokens[each.id]
            fields = {"stop_token_ids": [tokens[4]], "min_tokens": [0, 3, 8][index % 3], "max_tokens": 20}
            again = request(rng, (1, 1), temperature=0.0, **fields)
            again.prompts[:] = each.prompts
            requests.append(again)
        deployment.run(*requests)
        expected = [generate(each, models, HALF) for each in requests]
        assert_alone(deployment, requests, expected)
        for each, alone in zip(requests, expected, strict=True):
            stopped = alone.reason is FinishReason.STOP
            assert deployment.ended[each.id].stop_token == (each.stop_token_ids[0] if stopped else None)
        assert len(deployment.tokens[requests[0].id]) <= 5
        assert len(deployment.tokens[requests[2].id]) > 8


def test_with_nothing_else_to_choose_a_stop_token_is_chosen_all_the_same(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models), list_length=1) as deployment:
        one = request(rng, (5, 5), temperature=0.0, stop_token_ids=list(range(48)), min_tokens=3)
        deployment.run(one)
        assert deployment.ended[one.id].reason is FinishReason.STOP
        best = generate(replace(one, min_tokens=0), models, HALF)
        assert_alone(deployment, [one], [best])


SAMPLING = [
    {"logit_bias": {7: 100.0}},
    {"logit_bias": dict.fromkeys(range(0, 48, 2), -100.0)},
    {"logit_bias": {5: 2.0, 6: -3.0}, "stop_token_ids": [5, 9]},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -2.0, "temperature": 0.5},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 1.4, "logit_bias": {3: 9.0, 5: 8.0}, "temperature": 0.5},
    {"presence_penalty": 2.0, "frequency_penalty": 0.7, "repetition_penalty": 1.1, "top_p": 0.8, "top_k": 9},
    {"min_p": 0.1, "temperature": 1.6},
    {"temperatures": [0.5, 2.0]},
    {"temperature": 0.0},
]


def test_sampling_parameters_end_to_end(tmp_path, rng, models):
    """All kinds in one batch, over engines that park: each must come to what the definitions say."""
    engines = [FakeEngine(models[0], Behaviour(chunk=10)), FakeEngine(models[1], Behaviour(chunk=16))]
    with Deployment(tmp_path, engines, limits={"sequences": 6}) as deployment:
        requests = [request(rng, max_tokens=25, **fields) for fields in SAMPLING * 2]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
    assert set(deployment.tokens[requests[0].id]) == {7}
    assert all(token % 2 for token in deployment.tokens[requests[1].id])


def test_log_probabilities_are_those_before_bias_penalties_and_temperature(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models)) as deployment:
        one = request(
            rng, top_logprobs=0, temperature=0.7, logit_bias={3: 5.0}, repetition_penalty=1.3, expert_weights=True
        )
        deployment.run(one)
        alone = generate(one, models, HALF)
        found = [detail.logprob for detail in deployment.details[one.id]]
        np.testing.assert_allclose(found, alone.logprobs, atol=1e-4)
        assert {len(detail.top) for detail in deployment.details[one.id]} == {0}


def test_cached_prompt_tokens_are_the_fewest_over_the_experts_and_told_once(tmp_path, rng, models):
    engines = engines_of(models)
    with Deployment(tmp_path, engines) as deployment:
        one, two = request(rng, (40, 40)), request(rng, (20, 20))
        for engine, tokens in zip(engines, (36, 17), strict=True):
            engine.remember(one.id, one.prompts[engine.model.expert][:tokens])
        deployment.run(one, two)
        assert deployment.cached == {one.id: 16, two.id: 0}
        assert_alone(deployment, [one, two], [generate(each, models, HALF) for each in (one, two)])


def test_an_aborted_sequence_leaves_every_engine(tmp_path, rng, models):
    engines = engines_of(models, pause=0.002)
    with Deployment(tmp_path, engines, limits={"sequences": 2}) as deployment:
        running, other, waiting = (request(rng, max_tokens=2000) for _ in range(3))
        deployment.submit(running, other, waiting)
        deployment.until(lambda: len(deployment.tokens[running.id]) > 2)
        deployment.abort(waiting.id, running.id, 987654)
        stats = deployment.until_stats(lambda stats: stats.running == 1)
        assert stats.queued == 0 and stats.finished["abort"] == 2
        count = len(deployment.tokens[running.id])
        deployment.until(lambda: len(deployment.tokens[other.id]) > count + 3)
        assert len(engines[0].sequences) == len(engines[1].sequences) == 1
        deployment.abort(other.id)
        deployment.until_stats(lambda stats: not any(expert.running for expert in stats.experts))
        assert len(deployment.tokens[running.id]) == count
    assert not engines[0].sequences and not engines[1].sequences
    assert not deployment.ended


# --- policies that wait ---


class TaciturnEngine(FakeEngine):
    """As vLLM's Model Runner V2: it says nothing of a prompt of one token."""

    def scores(self):
        return [(sequence, logprobs) for sequence, logprobs in super().scores() if len(logprobs)]


@pytest.mark.parametrize("kind", [FakeEngine, TaciturnEngine])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_perplexity_waits_for_the_scores_of_the_prompt(tmp_path, rng, models, tau, kind):
    engines = [kind(model, Behaviour(chunk=12)) for model in models]
    with Deployment(tmp_path, engines, limits={"sequences": 4}) as deployment:
        requests = [
            request(rng, lengths, Perplexity(tau), expert_weights=True)
            for lengths in ((9, 20), (30, 4), (6, 6), (1, 8), (1, 1), (4, 1))  # the last two take over slots
        ]
        deployment.run(*requests)
        for each in requests:
            surprise = [cross_entropy(model, prompt) for model, prompt in zip(models, each.prompts, strict=True)]
            weights = np.exp(-np.array(surprise) / tau)
            weights /= weights.sum()
            assert deployment.tokens[each.id] == generate(each, models, shares(weights.tolist())).tokens
            for detail in deployment.details[each.id]:
                np.testing.assert_allclose(detail.coefficients, weights, rtol=1e-4)


# --- shutting down ---


def test_draining_lets_what_runs_finish(tmp_path, rng, models):
    engines = held(models)
    with Deployment(tmp_path, engines, limits={"sequences": 2}) as deployment:
        requests = [request(rng) for _ in range(3)]
        deployment.submit(*requests)
        deployment.until_stats(lambda stats: stats.running == 2)
        deployment.drain(20.0)
        deployment.until(lambda: deployment.statuses[-1].draining)
        assert not deployment.statuses[-1].ready
        late = request(rng)
        deployment.run(late)
        assert (deployment.ended[late.id].reason, deployment.ended[late.id].code) == ("error", "overloaded")
        assert not deployment.drained
        release(engines)
        deployment.until(lambda: deployment.drained)
        deployment.finish(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])


def test_after_the_grace_period_the_rest_is_ended(tmp_path, rng, models):
    with Deployment(tmp_path, engines_of(models, pause=0.005), limits={"sequences": 2}) as deployment:
        endless, other, waiting = (request(rng, max_tokens=2000) for _ in range(3))
        deployment.submit(endless, other, waiting)
        deployment.until(lambda: len(deployment.tokens[endless.id]) > 1)
        deployment.drain(0.1)
        deployment.until(lambda: deployment.drained)
        deployment.finish(endless, other, waiting)
        for each in (endless, other):
            ended = deployment.ended[each.id]
            assert (ended.reason, ended.code, ended.message) == ("error", "", "the server is shutting down")
        assert deployment.ended[waiting.id].code == "overloaded"


def test_draining_an_idle_deployment_is_done_at_once(tmp_path, models):
    with Deployment(tmp_path, engines_of(models)) as deployment:
        deployment.drain(20.0)
        deployment.until(lambda: deployment.drained)
        assert deployment.statuses[-1].draining
