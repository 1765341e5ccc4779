"""A coordinator with one expert here and one on another host: lost, cut off, replaced, refused."""

from __future__ import annotations

import time

import pytest

from server.errors import UnreachableError
from server.remote.dialer import dialers
from server.request import FinishReason
from tests.fakes import Behaviour, FakeEngine
from tests.server.coordinator.conftest import models, rng  # noqa: F401
from tests.server.coordinator.harness import Deployment
from tests.server.coordinator.reference import generate
from tests.server.coordinator.requests import request
from tests.server.coordinator.test_alignment import HALF, assert_alone
from tests.server.remote.site import KEY, Site, free_port, write_models

PAUSE = 0.005


@pytest.fixture
def far(tmp_path, monkeypatch) -> dict[int, dict]:
    """Expert b is on another host."""
    monkeypatch.setenv("POLYLOGIT_CLUSTER_KEY", KEY)
    write_models(tmp_path, "a", "b")
    return {1: {"address": f"127.0.0.1:{free_port()}"}}


def engine(model) -> FakeEngine:
    return FakeEngine(model, Behaviour(pause=PAUSE, cache=False))


def half_way(deployment: Deployment, requests) -> None:
    deployment.until(lambda: all(len(deployment.tokens[each.id]) > 4 for each in requests))


@pytest.mark.parametrize("missing", ["tail", "exact"])
@pytest.mark.parametrize("how", ["kill", "cut"])
def test_lost_in_the_middle_and_reached_again(tmp_path, rng, models, far, how, missing):  # noqa: F811
    deployment = Deployment(tmp_path, [FakeEngine(models[0]), engine(models[1])], expert=far, missing=missing)
    with Site(deployment.config, 1, deployment.engines[1]) as site, deployment:
        requests = [request(rng, max_tokens=25) for _ in range(4)]
        deployment.submit(*requests)
        half_way(deployment, requests)
        getattr(site, how)()
        deployment.until(lambda: deployment.statuses[-1].experts["b"] == "down")
        if how == "kill":
            deployment.until(lambda: "refused" in deployment.notes[-1])
            deployment.engines[1] = engine(models[1])
            with Site(deployment.config, 1, deployment.engines[1]):
                deployment.finish(*requests)
                stats = deployment.stats()
        else:
            deployment.finish(*requests)
            stats = deployment.stats()
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
    assert [expert.restarts for expert in stats.experts] == [0, 1]
    assert deployment.notes[0] == "" and deployment.notes[1] == "the connection was lost"


def test_fail_and_degrade(tmp_path, rng, models, far):  # noqa: F811
    for policy in ("fail", "degrade"):
        deployment = Deployment(tmp_path, [FakeEngine(models[0]), engine(models[1])], expert=far, on_expert_loss=policy)
        with Site(deployment.config, 1, deployment.engines[1]) as site, deployment:
            one = request(rng, max_tokens=25)
            deployment.submit(one)
            half_way(deployment, [one])
            site.kill()
            deployment.finish(one)
            wanted = FinishReason.ERROR if policy == "fail" else FinishReason.LENGTH
            assert deployment.ended[one.id].reason is wanted


def test_a_silent_host_is_given_up_after_the_time_limit(tmp_path, rng, models, far):  # noqa: F811
    given = {"tick_seconds": 0.5}
    deployment = Deployment(tmp_path, [FakeEngine(models[0]), engine(models[1])], expert=far, limits=given)
    with Site(deployment.config, 1, deployment.engines[1]), deployment:
        requests = [request(rng, max_tokens=25) for _ in range(3)]
        deployment.submit(*requests)
        half_way(deployment, requests)
        deployment.engines[1].behaviour.hold.clear()
        deployment.until(lambda: "no answer for 0.5 s" in deployment.notes)
        deployment.until(lambda: "another coordinator" in deployment.notes[-1])
        deployment.engines[1].behaviour.hold.set()
        deployment.finish(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        assert not deployment.restarts


def test_one_coordinator_at_a_time(tmp_path, rng, models, far):  # noqa: F811
    deployment = Deployment(tmp_path, [FakeEngine(models[0]), engine(models[1])], expert=far)
    with Site(deployment.config, 1, deployment.engines[1]):
        with deployment:
            one = request(rng)
            deployment.run(one)
            with pytest.raises(UnreachableError, match="it serves another coordinator") as raised:
                dialers(deployment.config)[1].dial()
            assert not raised.value.final
        again = Deployment(tmp_path, [FakeEngine(models[0]), deployment.engines[1]], expert=far)
        with again:
            two = request(rng)
            again.run(two)
            assert_alone(again, [two], [generate(two, models, HALF)])


def test_a_worker_whose_coordinator_went_away_drops_everything(tmp_path, rng, models, far):  # noqa: F811
    deployment = Deployment(tmp_path, [FakeEngine(models[0]), engine(models[1])], expert=far)
    with Site(deployment.config, 1, deployment.engines[1]):
        with deployment:
            one = request(rng, max_tokens=1000)
            deployment.submit(one)
            half_way(deployment, [one])
            deployment.abort(one.id)
        deadline = time.monotonic() + 10
        while deployment.engines[1].sequences and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not deployment.engines[1].sequences


def test_what_does_not_fit_is_final(tmp_path, models, far, monkeypatch):  # noqa: F811
    engines = [FakeEngine(models[0]), engine(models[1])]
    with Site(Deployment(tmp_path, engines, expert=far).config, 1, engines[1]):
        other = dialers(Deployment(tmp_path, engines, expert=far, top_k=7).config)[1]
        with pytest.raises(UnreachableError, match=r"^127.0.0.1:\d+: top_k is 48 there and 7 here$") as raised:
            other.dial()
        assert raised.value.final
        monkeypatch.setenv("POLYLOGIT_CLUSTER_KEY", "x" * 32)
        with pytest.raises(UnreachableError, match="does not accept this host's cluster key") as raised:
            dialers(Deployment(tmp_path, engines, expert=far).config)[1].dial()
        assert raised.value.final


def test_other_weights_are_noticed(tmp_path, models, far):  # noqa: F811
    deployment = Deployment(tmp_path, [FakeEngine(models[0]), engine(models[1])], expert=far)
    before = dialers(deployment.config)[1]._facts
    file = tmp_path / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    after = dialers(deployment.config)[1]._facts
    assert {name for name in before if before[name] != after[name]} == {"weights"}
