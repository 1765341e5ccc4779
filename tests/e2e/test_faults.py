"""An expert dies or hangs in the middle of an answer: what `on_expert_loss` promises, and that it comes back."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.support import demo
from tests.support.serving import Served, serve, until

EXPERTS = ["math", "text"]
LOST = "text"  # the one that is started last, so that its process is the youngest, restarted or not
TOKENS = 300
OTHERS = 7
TICK_SECONDS = 4.0
RESTART_SECONDS = 90.0
MESSAGES = [{"role": "user", "content": "Reverse the word planet."}]


@pytest.fixture
def chance() -> random.Random:
    """Different in every run; the token at which the fault comes is printed."""
    return random.Random()


def deployment(on_expert_loss: str) -> dict[str, Any]:
    return demo.configuration(
        experts=EXPERTS,
        on_expert_loss=on_expert_loss,
        limits={"tick_seconds": TICK_SECONDS, "grace_seconds": 10},
    )


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(deployment(request.param)) as server:
        yield server


class Answer:
    """An answer as it streams: `text`, `reason`, and the expert weights token by token."""

    def __init__(self, server: Served, messages: list[dict[str, str]] = MESSAGES) -> None:
        self.text, self.reason = "", None
        self.weights: list[dict[str, float]] = []
        self._chunks = iter(
            server.openai.with_options(timeout=RESTART_SECONDS).chat.completions.create(
                model="demo",
                messages=messages,
                temperature=0,
                max_tokens=TOKENS,
                stream=True,
                extra_body={"ignore_eos": True, "expert_weights": True},
            )
        )

    def read(self, tokens: int = TOKENS) -> Answer:
        """Go on until `tokens` have come, or to the end."""
        while len(self.weights) < tokens and (chunk := next(self._chunks, None)) is not None:
            choice = chunk.choices[0]
            self.text += choice.delta.content or ""
            self.weights += getattr(choice, "expert_weights", None) or []
            self.reason = choice.finish_reason or self.reason
        return self


def strike(server: Served, what: signal.Signals, chance: random.Random) -> tuple[Answer, int]:
    """Start an answer and send a signal to the lost expert's process at a random token."""
    at = chance.randint(1, TOKENS // 2)
    victim = server.experts()[-1]
    answer = Answer(server).read(at)
    os.kill(victim, what)
    print(f"\n{what.name} to {LOST} after token {at}")
    return answer, victim


def back(server: Served, restarts: int) -> bool:
    """Whether the lost expert was restarted and the server is ready again."""
    metrics = server.metrics()
    label = f"{{expert={LOST}}}"
    return (
        metrics[f"polylogit_expert_restarts_total{label}"] == restarts
        and metrics[f"polylogit_expert_up{label}"] == 1
        and server.http.get("/health/ready").status_code == 200
    )


def wait_back(server: Served, restarts: int) -> None:
    until(lambda: back(server, restarts), limit=RESTART_SECONDS, what=f"{LOST} is up again, restarts {restarts}")
    assert server.metrics()[f"polylogit_expert_restarts_total{{expert={EXPERTS[0]}}}"] == 0


class Crowd:
    """Other answers that stream at the same time, each read by a thread of its own."""

    def __init__(self, server: Served) -> None:
        self._pool = ThreadPoolExecutor(OTHERS)
        self._texts = [
            self._pool.submit(lambda messages: Answer(server, messages).read().text, messages)
            for messages in demo.conversations(OTHERS)
        ]

    def texts(self) -> list[str]:
        with self._pool:
            return [text.result(timeout=RESTART_SECONDS) for text in self._texts]


@pytest.mark.parametrize("server", ["wait"], indirect=True)
def test_wait_continues_as_if_nothing_had_happened(server: Served, chance: random.Random) -> None:
    undisturbed, others = Answer(server).read(), Crowd(server).texts()
    assert (undisturbed.reason, len(undisturbed.weights)) == ("length", TOKENS)
    assert len(set(others)) == OTHERS
    for restarts, what in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
        crowd = Crowd(server)
        answer, victim = strike(server, what, chance)
        answer.read()
        assert (answer.text, answer.reason) == (undisturbed.text, "length")
        assert crowd.texts() == others
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
