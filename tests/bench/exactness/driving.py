"""The project's own coordinator and workers over engines that repeat a recording: one token at a position of it.

A prompt is one token, the number of the position, and whatever follows it, the engine says the same again; so a
sequence of T tokens is T draws at one position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

from server.coordinator.observer import Observer
from server.coordinator.sampler import Sampled
from server.policy import Policy, participants
from server.request import SequenceRequest
from server.wire.api import Ended, Recorded, TokenDetails
from server.wire.stats import Stats
from tests.bench.exactness.recording import Recording
from tests.support.coordinator.harness import Deployment
from tests.support.fake_engine import Behaviour, FakeEngine, FakeModel
from tests.support.sequences import greedy, sampled

TOGETHER = 32
ROOM = 1 << 20
_GENERATED = Observer.generated


class _Repeated(FakeModel):
    """One expert of a recording, which is normalised: its log-probabilities are its logits."""

    def __init__(self, recording: Recording, expert: int) -> None:
        super().__init__(expert, recording.logprobs.shape[-1])
        object.__setattr__(self, "_rows", recording.logprobs[:, expert])

    def logits(self, tokens: Any) -> np.ndarray:
        return self._rows[tokens[0]]


@dataclass(frozen=True, slots=True)
class Usage:
    """What some tokens took."""

    tokens: int
    """How many they were."""
    asked: dict[str, int]
    """Reason -> tokens for which whole rows were asked for."""
    received: dict[str, int]
    """"lists" or "rows" -> bytes that came from all experts."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of one token of one sequence."""

    token: int
    """Its id."""
    record: Recorded
    """What the experts showed."""
    details: TokenDetails
    """As shown to who asked for log-probabilities, or for coefficients alone."""
    sampled: Sampled
    """What the coordinator knew of it, all bounds included. Its one row."""

    def bound(self, temperature: float) -> float:
        """How far the log of the normaliser at a temperature may be from what the coordinator takes for it, in nats."""
        if self.sampled.whole:
            return 0.0
        fused = self.sampled.fused
        [low], [high] = fused.bounds.log_normalisers(fused.rule, np.array([1 / temperature]))
        return float(high - low) / 2


class Driver:
    """Runs sequences at positions of a recording."""

    def __init__(self, deployment: Deployment, recording: Recording) -> None:
        self._deployment = deployment
        self._recording = recording

    def request(
        self, position: int, policy: Policy, temperature: float, seed: int = 0, tokens: int = 1, **fields: Any
    ) -> SequenceRequest:
        """A sequence at a position; temperature 0 is greedy."""
        used = range(len(self._recording.experts)) if fields.get("record") else participants(policy, self.names)
        prompts = [[position] if expert in used else [] for expert in range(len(self._recording.experts))]
        if temperature == 0:
            return greedy(prompts, policy, tokens, **fields)
        return sampled(prompts, policy, tokens, seed=seed, temperature=temperature, **fields)

    @property
    def names(self) -> list[str]:
        return self._recording.experts

    def run(self, requests: list[SequenceRequest]) -> tuple[list[list[int]], Usage]:
        """The tokens of each, and what all took together."""
        before = self._deployment.stats()
        for start in range(0, len(requests), TOGETHER):
            self._deployment.run(*requests[start : start + TOGETHER])
        return [self._deployment.tokens.pop(request.id) for request in requests], self._usage(before)

    def observe(self, request: SequenceRequest) -> Observed:
        """Run one sequence of one token, alone."""
        request = replace(request, record=True, expert_weights=True)
        seen: list[Sampled] = []

        def generated(observer: Observer, sampled: Sampled, ended: Iterable[Ended]) -> None:
            seen.append(sampled)
            _GENERATED(observer, sampled, ended)

        with patch.object(Observer, "generated", generated):
            self._deployment.run(request)
        [[token], [details], [sampled]] = (
            self._deployment.tokens.pop(request.id),
            self._deployment.details.pop(request.id),
            seen,
        )
        return Observed(token, self._deployment.records.pop(), details, sampled)

    def _usage(self, before: Stats) -> Usage:
        after = self._deployment.stats()
        reasons = after.whole_rows
        return Usage(
            after.tokens - before.tokens,
            {reason: reasons[reason] - before.whole_rows.get(reason, 0) for reason in reasons},
            _received(before, after),
        )


@contextmanager
def driver(recording: Recording, **settings: Any) -> Iterator[Driver]:
    """A deployment over `recording`; its experts have the recording's names."""
    engines = [
        FakeEngine(_Repeated(recording, expert), Behaviour(kv_tokens=ROOM, max_model_len=ROOM, cache=False))
        for expert in range(len(recording.experts))
    ]
    limits = {"sequences": TOGETHER, "queue": 4 * TOGETHER}
    named = {index: {"name": name} for index, name in enumerate(recording.experts)}
    with (
        TemporaryDirectory(prefix="polylogit-") as folder,
        Deployment(Path(folder), engines, expert=named, limits=limits, **settings) as deployment,
    ):
        yield Driver(deployment, recording)


def _received(before: Stats, after: Stats) -> dict[str, int]:
    pairs = list(zip(before.experts, after.experts, strict=True))
    return {
        kind: sum(late.received_bytes.get(kind, 0) - early.received_bytes.get(kind, 0) for early, late in pairs)
        for kind in ("lists", "rows")
    }
