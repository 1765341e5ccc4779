"""Counts over fused tokens, against sums by hand, and the clock of the ticks."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from server.coordinator.bounds import Rule, bound
from server.coordinator.clock import Phase, TickClock, timed
from server.coordinator.fuser import Fused
from server.coordinator.fusion import tabulate
from server.coordinator.tally import TokenTally
from server.policy import Uniform, Weights
from server.wire.stats import Histogram
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import FakeEngine

VOCABULARY = 8


def count(tally: TokenTally, tops: list[list[int]], coefficients: list[list[float]], available=None) -> None:
    """Count rows in which the experts' most probable tokens are `tops` [B, E]."""
    first = np.array(tops, np.int32)
    ids = np.stack([first, (first + 1) % VOCABULARY], axis=-1).astype(np.int32)
    logprobs = np.broadcast_to(np.log(np.array([0.7, 0.2], np.float32)), ids.shape).copy()
    usable = np.ones(first.shape, bool) if available is None else np.array(available)
    ids[~usable], logprobs[~usable] = -1, -np.inf
    rows = len(ids)
    exact = np.full((rows, 1), -1, np.int32), np.full((*first.shape, 1), -np.inf, np.float32)
    table = tabulate(ids, logprobs, *exact, VOCABULARY)
    unmasked = np.full(rows, -1, np.int64), np.zeros(rows, np.float32)
    rule = Rule(np.array(coefficients, np.float32), np.zeros(rows, bool), *unmasked)
    bounds = bound(table, logprobs[:, :, -1], rule, VOCABULARY)
    slots, ungated = np.arange(rows), np.zeros(rows, bool)
    state = np.zeros((rows, 0), np.float32)
    tally.count(Fused(slots, ids, logprobs, np.ones_like(usable), usable, table, rule, bounds, ungated, state, 2))


def in_bucket(histogram: Histogram, value: float) -> int:
    return histogram.counts[next(i for i, bound in enumerate(histogram.bounds) if value <= bound)]


def test_shares_and_entropy():
    tally = TokenTally(2)
    count(tally, [[1, 1], [1, 1], [1, 1]], [[3.0, 1.0], [0.0, 0.5], [0.25, -0.75]])
    first, second = tally.shares(0), tally.shares(1)
    assert (first.sum, second.sum) == (0.75 + 0 + 0.25, 0.25 + 1 + 0.75)
    assert in_bucket(first, 0.75) == in_bucket(second, 0.75) == in_bucket(second, 1.0) == in_bucket(first, 0.0) == 1
    entropy = tally.snapshot().entropy
    mixed = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert entropy.sum == pytest.approx(2 * mixed)
    assert (in_bucket(entropy, 0.0), in_bucket(entropy, mixed), sum(entropy.counts)) == (1, 2, 3)


def test_only_the_larger_share_is_decisive():
    tally = TokenTally(3)
    count(tally, [[1, 1, 1]] * 4, [[0.5, 0.3, 0.2], [1 / 3] * 3, [0.4, 0.4, 0.2], [0.3, -0.6, 0.1]])
    assert [tally.decisive(expert) for expert in range(3)] == [1, 1, 0]


def test_disagreement_and_certificates():
    tally = TokenTally(2)
    count(tally, [[1, 1], [1, 5], [1, 5], [2, 2]], [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [1.0, -0.1]])
    counts = tally.snapshot()
    assert (counts.tokens, counts.disagreements) == (4, 2)
    assert counts.certificates == {"certain": 2, "open": 1, "unbounded": 1}


def test_tokens_of_one_expert_are_not_fused():
    tally = TokenTally(2)
    count(tally, [[1, 2], [1, 2]], [[1.0, 0.0], [0.5, 0.5]], available=[[True, False], [True, True]])
    counts = tally.snapshot()
    assert counts.tokens == sum(counts.certificates.values()) == sum(counts.entropy.counts) == 1
    assert sum(tally.shares(0).counts) == 1


def test_a_deployment_counts(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=4) as deployment:
        policies = [Uniform(), Weights({"a": 0.9, "b": 0.1}), Weights({"a": 1.5, "b": -0.5})]
        requests = [request(rng, policy=policy, max_tokens=6, stop_token_ids=[]) for policy in policies]
        deployment.run(*requests)
        stats = deployment.stats()
    tokens = sum(len(deployment.tokens[one.id]) for one in requests)
    assert stats.tokens == stats.fusion.tokens == sum(stats.fusion.certificates.values()) == tokens == 18
    assert stats.fusion.certificates["unbounded"] == 6
    assert stats.experts[0].decisive_tokens == 12  # uniform weights decide nothing
    assert 0 < stats.fusion.disagreements <= tokens
    assert sum(stats.queue_seconds.counts) == 3
    assert all(expert.prefilled_tokens >= sum(len(one.prompts[0]) for one in requests) for expert in stats.experts)
    assert sum(stats.tick_seconds.counts) == stats.ticks >= 6
    assert stats.experts[0].slowest_ticks + stats.experts[1].slowest_ticks <= stats.ticks
    assert set(stats.phase_seconds) == {phase.value for phase in Phase}
    assert sum(stats.phase_seconds.values()) == pytest.approx(stats.tick_seconds.sum)


def test_idle_time_belongs_to_no_tick():
    clock = TickClock()
    clock.start(0.0)
    clock.stop()
    before = dict(clock.seconds)
    time.sleep(0.05)
    clock.start(None)
    clock.switch(Phase.ALIGN)
    clock.stop()
    assert clock.seconds == before
    clock.start(0.0)
    clock.stop()
    assert sum(clock.ticks.snapshot().counts) == 2
    assert sum(clock.seconds.values()) == pytest.approx(clock.ticks.snapshot().sum)
    assert clock.ticks.snapshot().sum < 0.05


def test_time_within_a_timed_method_is_not_its_callers():
    class Work:
        clock = TickClock()

        @timed(Phase.FUSE)
        def outer(self) -> None:
            time.sleep(0.01)
            self.inner()

        @timed(Phase.GATE)
        def inner(self) -> None:
            time.sleep(0.03)
            raise ValueError

    work = Work()
    work.clock.start(0.0)
    with pytest.raises(ValueError):
        work.outer()
    work.clock.stop()
    seconds = work.clock.seconds
    assert seconds[Phase.GATE] >= 0.03
    assert 0.01 <= seconds[Phase.FUSE] < seconds[Phase.GATE]
    assert sum(seconds.values()) == pytest.approx(work.clock.ticks.snapshot().sum)
