"""A coordinator and an expert that it reaches over TCP: the same text, whatever happens on the way."""

from __future__ import annotations

import numpy as np
import pytest

from server.errors import UnreachableError
from server.policy import Single
from server.remote.agreement import Offer, Terms, offer
from server.remote.dialer import Dialer
from server.request import FinishReason
from tests.support.coordinator.alone import HALF, along, assert_alone, assert_details, generate, shares
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import VOCABULARY, Behaviour, FakeEngine, FakeModel
from tests.support.two_hosts import KEY, TwoHosts


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def models() -> list[FakeModel]:
    return [FakeModel(0), FakeModel(1)]


def engines(models: list[FakeModel], **behaviour) -> list[FakeEngine]:
    """`behaviour`: of the expert on the other host."""
    return [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(**behaviour))]


def dialer(deployment: TwoHosts, key: bytes = KEY, **facts_differ: str) -> Dialer:
    given = offer(deployment.config, "b")
    return Dialer(f"127.0.0.1:{deployment.way.port}", key, Offer(given.facts | facts_differ, given.terms))


def test_the_text_is_the_same_as_on_one_host(tmp_path, rng, models):
    with TwoHosts(tmp_path, engines(models)) as deployment:
        requests = [request(rng, max_tokens=15) for _ in range(4)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        assert deployment.host.terms == [Terms(VOCABULARY, "none")]
        assert deployment.notes == [""] or deployment.notes[-1] == ""


def test_whole_rows_come_over_the_network(tmp_path, rng, models):
    """The other host cannot write to this one's memory."""
    with TwoHosts(tmp_path, engines(models, chunk=9), list_length=4) as deployment:
        requests = [request(rng, max_tokens=15, temperature=0.0, top_logprobs=2) for _ in range(4)]
        deployment.run(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        for each in requests:
            tokens = deployment.tokens[each.id]
            assert_details(deployment.details[each.id], tokens, along(each, models, HALF, tokens), error=1e-3 + 1e-5)
        here, there = (expert.received_bytes for expert in deployment.stats().experts)
        assert here["rows"] == there["rows"] > 0
        assert deployment.host.terms == [Terms(4, "none")]


# --- what breaks ---


def test_a_worker_that_died_and_was_started_again_goes_on_exactly_where_it_was(tmp_path, rng, models):
    with TwoHosts(tmp_path, engines(models, fail_at=6), on_expert_loss="wait") as deployment:
        requests = [request(rng, max_tokens=15) for _ in range(4)]
        deployment.submit(*requests)
        deployment.lose(1)
        deployment.until(lambda: deployment.statuses[-1].experts["b"] == "down")
        assert not deployment.statuses[-1].ready
        during = request(rng)
        deployment.submit(during)
        deployment.start(1, FakeEngine(models[1]))
        everything = [*requests, during]
        deployment.finish(*everything)
        assert_alone(deployment, everything, [generate(each, models, HALF) for each in everything])
        assert deployment.statuses[-1].ready
        assert [expert.restarts for expert in deployment.stats().experts] == [0, 1]
        assert not deployment.restarts, "the supervisor was asked to restart what is not its own"


def test_a_broken_network_empties_the_worker_and_nothing_is_lost(tmp_path, rng, models):
    """The limit of a tick is 20 s: the coordinator notices the break itself."""
    with TwoHosts(tmp_path, engines(models, pause=0.02), on_expert_loss="wait") as deployment:
        requests = [request(rng, max_tokens=30) for _ in range(3)]
        deployment.submit(*requests)
        for count in (5, 15):
            deployment.until(lambda count=count: len(deployment.tokens[requests[0].id]) >= count)
            deployment.way.cut()
        deployment.finish(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        assert deployment.stats().experts[1].restarts == 2
        assert "the connection was lost" in deployment.notes
        assert len(deployment.host.terms) == 3
    assert deployment.engines[1].peak == 3 and not deployment.engines[1].sequences


def test_a_silent_host_is_given_up_after_the_time_limit_of_a_tick(tmp_path, rng, models):
    settings = {"on_expert_loss": "wait", "limits": {"tick_seconds": 1.5}}
    with TwoHosts(tmp_path, engines(models, pause=0.02), **settings) as deployment:
        requests = [request(rng, max_tokens=20) for _ in range(3)]
        deployment.submit(*requests)
        deployment.until(lambda: len(deployment.tokens[requests[0].id]) >= 5)
        deployment.way.freeze()
        deployment.until(lambda: "no answer for 1.5 s" in deployment.notes)
        deployment.way.thaw()
        deployment.finish(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])


def test_degrade_goes_on_without_it_and_takes_it_up_again(tmp_path, rng, models):
    with TwoHosts(tmp_path, engines(models, fail_at=5), on_expert_loss="degrade") as deployment:
        both, only_b = request(rng), request(rng, (0, 9), Single("b"))
        deployment.submit(both, only_b)
        deployment.lose(1)
        deployment.finish(both, only_b)
        assert deployment.ended[both.id].reason is not FinishReason.ERROR
        assert deployment.ended[only_b.id].message == "expert b was lost"
        assert deployment.statuses[-1].ready and deployment.statuses[-1].experts["b"] == "down"
        deployment.start(1, FakeEngine(models[1]))
        deployment.until(lambda: deployment.statuses[-1].experts["b"] == "up")
        again, single = request(rng), request(rng, (0, 9), Single("b"))
        deployment.run(again, single)
        assert_alone(
            deployment, [again, single], [generate(again, models, HALF), generate(single, models, shares([0, 1]))]
        )


def test_fail_ends_what_ran(tmp_path, rng, models):
    with TwoHosts(tmp_path, engines(models, fail_at=5), on_expert_loss="fail") as deployment:
        one = request(rng)
        deployment.run(one)
        assert deployment.ended[one.id].message == "expert b was lost"
        deployment.lose(1)


def test_a_worker_outlives_its_coordinator_and_serves_the_next(tmp_path, rng, models):
    """The first coordinator leaves in the middle of a generation; nothing of it is left in the engine."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    started = engines(models, pause=0.02)
    with TwoHosts(folders[0], started) as first:
        long = request(rng, max_tokens=1000)
        first.submit(long)
        first.until(lambda: len(first.tokens[long.id]) >= 3)
        host = first.keep_host()
        first.abort(long.id)  # only so that no end is expected of it
    with TwoHosts(folders[1], [FakeEngine(models[0]), started[1]], host=host) as second:
        one = request(rng)
        second.run(one)
        assert_alone(second, [one], [generate(one, models, HALF)])
        assert len(host.terms) == 2 and started[1].peak == 1


# --- who is let in ---


def test_a_second_coordinator_is_refused_while_one_is_served(tmp_path, rng, models):
    with TwoHosts(tmp_path, engines(models)) as deployment:
        with pytest.raises(UnreachableError, match="it serves another coordinator") as raised:
            dialer(deployment).dial()
        assert not raised.value.final
        one = request(rng)
        deployment.run(one)
        assert_alone(deployment, [one], [generate(one, models, HALF)])


@pytest.mark.parametrize(
    ("key", "facts_differ", "words"),
    [
        (b"x" * 32, {}, "it does not accept this host's cluster key"),
        (KEY, {"list_length": "5"}, "list_length is 48 at the expert and 5 at the coordinator"),
        (KEY, {"polylogit": "9.9"}, r"polylogit is \S+ at the expert and 9.9 at the coordinator"),
        (KEY, {"model": "other"}, r"model is \w+ at the expert and other at the coordinator"),
        (KEY, {"gate": "other"}, "gate is none at the expert and other at the coordinator"),
    ],
)
def test_who_does_not_fit_is_told_why_and_turned_away(tmp_path, rng, models, key, facts_differ, words):
    with TwoHosts(tmp_path, engines(models)) as deployment:
        with pytest.raises(UnreachableError, match=words) as raised:
            dialer(deployment, key, **facts_differ).dial()
        assert raised.value.final
        deployment.run(request(rng))
