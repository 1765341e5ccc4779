"""When what happened to the sequences of traced requests."""

from __future__ import annotations

from server.coordinator.timings import Timings
from server.policy import Single
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import Behaviour, FakeEngine


def test_each_moment_in_its_order(tmp_path, rng, models):
    """Expert b reads its prompt in three steps of at least 10 ms; the second sequence waits for the first to end."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(chunk=5, pause=0.01))]
    with Deployment(tmp_path, engines, limits={"sequences": 1}) as deployment:
        first, second = request(rng, timed=True), request(rng, timed=True, max_tokens=1)
        deployment.run(first, second)
    assert deployment.timings.keys() == {first.id, second.id}
    for timing in deployment.timings.values():
        a, b = timing.prefilled
        assert timing.queued <= timing.admitted < a < b <= timing.first_token
        assert b - a >= 0.01
    assert deployment.timings[second.id].admitted > deployment.timings[first.id].first_token
    assert deployment.timings[second.id].queued < deployment.timings[first.id].first_token


def test_an_expert_that_is_not_used_has_no_moment(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models]) as deployment:
        one = request(rng, (9, 0), Single("a"), timed=True)
        deployment.run(one)
    assert deployment.timings[one.id].prefilled[0] > 0 == deployment.timings[one.id].prefilled[1]


def test_others_are_not_timed(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models]) as deployment:
        deployment.run(request(rng), request(rng))
    assert deployment.timings == {}


def test_nothing_is_kept_of_what_ended_before_its_first_token(rng):
    timings = Timings(2)
    timings.queued([request(rng)])
    assert not timings
    one = request(rng, timed=True)
    timings.queued([one])
    assert timings
    timings.forget(one.id)
    assert not timings
