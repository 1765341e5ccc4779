"""An expert dies or hangs in the middle of an answer: what `on_expert_loss` promises, and that it comes back."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator

import openai
import pytest

from tests.support.lost_expert import LOST, OTHERS, TOKENS, Answer, Crowd, Undisturbed, configuration, wait_back
from tests.support.server_process import Served, serve


@pytest.fixture
def chance() -> random.Random:
    """Different in every run; the token at which the fault comes is printed."""
    return random.Random()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(configuration(request.param)) as server:
        yield server


def strike(server: Served, what: signal.Signals, chance: random.Random) -> tuple[Answer, int]:
    """Start an answer and send a signal to the lost expert's process at a random token."""
    at = chance.randint(1, TOKENS // 2)
    victim = server.experts()[-1]
    answer = Answer(server).read(at)
    os.kill(victim, what)
    print(f"\n{what.name} to {LOST} after token {at}")
    return answer, victim


def test_wait_continues_as_if_nothing_had_happened(
    waiting_server: Served, undisturbed: Undisturbed, chance: random.Random
) -> None:
    server, alone = waiting_server, undisturbed.answer
    assert (alone.reason, len(alone.weights)) == ("length", TOKENS)
    assert len(set(undisturbed.others)) == OTHERS
    for restarts, what in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
        crowd = Crowd(server)
        answer, victim = strike(server, what, chance)
        answer.read()
        assert (answer.text, answer.reason) == (alone.text, "length")
        assert crowd.texts() == undisturbed.others
        assert all(weights[LOST] == 0.5 for weights in answer.weights)
        wait_back(server, restarts)
        assert victim not in server.experts()


@pytest.mark.parametrize("server", ["degrade"], indirect=True)
def test_degrade_continues_without_the_expert(server: Served, chance: random.Random) -> None:
    answer, _ = strike(server, signal.SIGKILL, chance)
    answer.read()
    assert (answer.reason, len(answer.weights)) == ("length", TOKENS)
    shares = [weights[LOST] for weights in answer.weights]
    lost_at = shares.index(0.0)
    assert set(shares[:lost_at]) == {0.5}
    assert set(shares[lost_at:]) == {0.0}
    assert all(weights["math"] == 1.0 for weights in answer.weights[lost_at:])
    wait_back(server, 1)
    assert {weights[LOST] for weights in Answer(server).read().weights} == {0.5}


@pytest.mark.parametrize("server", ["fail"], indirect=True)
def test_fail_ends_the_stream_with_an_error(server: Served, chance: random.Random) -> None:
    answer, _ = strike(server, signal.SIGKILL, chance)
    started = time.monotonic()
    with pytest.raises(openai.APIError, match=LOST):
        answer.read()
    assert time.monotonic() - started < 10
    assert answer.reason is None
    wait_back(server, 1)
    assert Answer(server).read().reason == "length"
