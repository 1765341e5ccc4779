"""Two experts, the second of which is lost in the middle of answers, and those answers as they stream."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.support import demo
from tests.support.server_process import Served, until

EXPERTS = ["math", "text"]
LOST = EXPERTS[-1]  # the one that is started last, so that its process is the youngest, restarted or not
TOKENS = 300
OTHERS = 7
RESTART_SECONDS = 90.0
MESSAGES = [{"role": "user", "content": "Reverse the word planet."}]


def configuration(on_expert_loss: str) -> dict[str, Any]:
    """Each expert has a named core, so that its sums are rounded alike wherever it runs."""
    cores = sorted(os.sched_getaffinity(0))
    return demo.configuration(
        experts=EXPERTS,
        on_expert_loss=on_expert_loss,
        limits={"tick_seconds": 4.0, "grace_seconds": 10},
        only={name: {"cpus": [cores[index % len(cores)]]} for index, name in enumerate(EXPERTS)},
    )


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


@dataclass(frozen=True)
class Undisturbed:
    """What `answer` and the `others` come to when nothing is lost."""

    answer: Answer
    others: list[str]


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
