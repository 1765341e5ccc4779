"""Compiles the tick's inner loops while the engines load, by running a few ticks over made-up reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from server.config import parse_config
from server.coordinator.coordinator import Coordinator
from server.coordinator.fuser import Fuser
from server.coordinator.links import ExpertLink, LinkState
from server.coordinator.observer import Observer
from server.coordinator.table import SequenceTable
from server.policy import Policy, Select, Uniform
from server.request import SamplingParams, SequenceRequest
from server.wire.expert import Load, Ready, Report

_VOCABULARY, _TOP_K = 16, 4


def warm_up() -> None:
    """Run two ticks of a coordinator without engines: arrays have the types, not the sizes, of a real one's."""
    names = ["a", "b"]
    config = parse_config(
        {"name": "warm-up", "experts": [{"name": name, "model": name} for name in names]}, directory=Path()
    )
    links = [ExpertLink(index, name) for index, name in enumerate(names)]
    for link in links:
        link.state, link.info = LinkState.UP, Ready(1024, 16, 1024, _VOCABULARY, 8, "")
    observer = Observer(len(names))
    table = SequenceTable(config.limits.sequences, len(names), _TOP_K, 0, 0, _VOCABULARY)
    fuser = Fuser(names, _VOCABULARY, None, "tail", lambda wanted: {}, observer.clock)
    coordinator = Coordinator(config, links, fuser, table, observer)
    sampling = SamplingParams(temperature=0.5, top_p=0.9)
    policies: tuple[Policy, ...] = (Uniform(), Select("entropy"))
    coordinator.sequences.submit(
        [
            SequenceRequest(number, [[1], [1]], policy, sampling, max_tokens=2, stop_token_ids=[0])
            for number, policy in enumerate(policies)
        ]
    )
    coordinator.tick()
    for position in (1, 2):
        for link in links:
            link.report, link.owes_report = _report(list(table.requests), position), False
        coordinator.tick()


def _report(slots: list[int], position: int) -> Report:
    rows = len(slots)
    return Report(
        number=0,
        slots=np.array(slots, np.int32).tobytes(),
        positions=np.full(rows, position, np.int32).tobytes(),
        ids=np.tile(np.arange(_TOP_K, dtype=np.int32), (rows, 1)).tobytes(),
        logprobs=np.full((rows, _TOP_K), -2.0, np.float32).tobytes(),
        exact=np.full((rows, 1), -3.0, np.float32).tobytes(),
        projected=b"",
        step_seconds=0.0,
        load=Load(0.0, rows, 0),
        cached_tokens={},
    )
