"""Compiles the tick's inner loops while the engines load, by running a few ticks over made-up reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from server.config import parse_config
from server.coordinator.arrays import Float32, Int32
from server.coordinator.coordinator import Coordinator
from server.coordinator.fuser import Fuser
from server.coordinator.links import ExpertLink, LinkState
from server.coordinator.observer import Observer
from server.coordinator.table import SequenceTable
from server.policy import Select, Uniform
from server.request import SamplingParams, SequenceRequest
from server.wire.expert import Load, Ready, Report

_VOCABULARY, _LISTED = 16, 4
_PROMPTS = [[1], [1]]


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
    table = SequenceTable(config.limits.sequences, len(names), _LISTED, 0, 0, _VOCABULARY)
    fuser = Fuser(names, _VOCABULARY, None, _whole_rows, observer.clock)
    coordinator = Coordinator(config, links, fuser, table, observer)
    plain, cut = SamplingParams(temperature=0.5), SamplingParams(temperature=0.5, top_p=0.9)
    requests = [
        SequenceRequest(1, _PROMPTS, Uniform(), cut, max_tokens=2, stop_token_ids=[0]),
        SequenceRequest(2, _PROMPTS, Select("entropy"), plain, max_tokens=2),
        SequenceRequest(3, _PROMPTS, Uniform(space="prob"), plain, max_tokens=2, top_logprobs=1, record=True),
        # Of so many sequences some come to what the lists do not say, and are sampled from whole rows.
        *(SequenceRequest(number, _PROMPTS, Uniform(), _seeded(number), max_tokens=2) for number in range(4, 12)),
    ]
    coordinator.sequences.submit(requests)
    coordinator.tick()
    for position in (1, 2):
        for link in links:
            link.report, link.owes_report = _report(list(table.requests), position), False
        coordinator.tick()


def _seeded(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed)


def _whole_rows(wanted: dict[int, Int32]) -> dict[int, Float32]:
    """Flat distributions."""
    flat = np.full(_VOCABULARY, -np.log(_VOCABULARY), np.float32)
    return {expert: np.tile(flat, (len(slots), 1)) for expert, slots in wanted.items()}


def _report(slots: list[int], position: int) -> Report:
    rows = len(slots)
    return Report(
        number=0,
        slots=np.array(slots, np.int32).tobytes(),
        positions=np.full(rows, position, np.int32).tobytes(),
        ids=np.tile(np.arange(_LISTED, dtype=np.int32), (rows, 1)).tobytes(),
        logprobs=np.full((rows, _LISTED), -2.0, np.float32).tobytes(),
        exact=np.full((rows, 1), -3.0, np.float32).tobytes(),
        entropies=np.full(rows, 2.0, np.float32).tobytes(),
        projected=b"",
        step_seconds=0.0,
        load=Load(0.0, rows, 0),
        cached_tokens={},
    )
