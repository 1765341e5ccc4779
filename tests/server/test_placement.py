"""Where experts run: their cores and GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.config import parse_config
from server.placement import expert_cpus, expert_gpus


@pytest.mark.parametrize(
    ("cores", "experts", "expected"),
    [
        (range(8), [{}, {}], [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (range(3), [{}, {}], [[0, 2], [1]]),
        ([4, 9], [{}, {}, {}], [[4], [9], [4]]),
        (range(4), [{"cpus": [3]}, {}, {"device": "cuda"}], [[3], [0, 1, 2], None]),
        ([0], [{"device": "cuda"}], [None]),
    ],
)
def test_cpu_experts_share_the_cores_of_this_process(monkeypatch, cores, experts, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
    named = [{"name": f"e{index}", "model": "m", **fields} for index, fields in enumerate(experts)]
    given = parse_config({"name": "fake", "experts": named}, directory=Path())
    assert expert_cpus(given) == expected


def test_gpu_experts_take_the_next_free_ones():
    fields = [
        {"device": "cuda"},
        {"device": "cuda", "gpus": [1, 0], "tensor_parallel_size": 2},
        {},
        {"device": "cuda", "tensor_parallel_size": 2},
    ]
    experts = [{"name": f"e{index}", "model": "m", **each} for index, each in enumerate(fields)]
    given = parse_config({"name": "fake", "experts": experts}, directory=Path())
    assert expert_gpus(given) == [[2], [1, 0], [], [3, 4]]


def test_every_host_has_cores_and_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    there, elsewhere = {"address": "10.0.0.2:8100"}, {"address": "10.0.0.3:8100"}
    fields = [{}, {"device": "cuda"}, {}, there, there | {"device": "cuda"}, elsewhere | {"device": "cuda"}]
    fields[4] |= {"tensor_parallel_size": 2, "address": "10.0.0.2:8101"}
    experts = [{"name": f"e{index}", "model": "m", **each} for index, each in enumerate(fields)]
    given = parse_config({"name": "fake", "experts": experts}, directory=Path())
    assert expert_cpus(given) == [[0, 2], None, [1, 3], [0, 1, 2, 3], None, None]
    assert expert_gpus(given) == [[], [0], [], [], [0, 1], [0]]
