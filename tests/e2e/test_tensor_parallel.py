"""An expert over two ranks says what it says over one, and its ranks listen to nobody else."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import parse_config
from server.launch.local import LocalDeployment
from server.policy import Gate, Single, Uniform
from tests.support import demo, gates, processes
from tests.support.listening import listening, own_address
from tests.support.sequences import greedy

SHARED = Path("/dev/shm")
PROMPTS = [[257, 260, *text.encode(), 258, 261] for text in ("Add 27 and 58.", "Reverse stone.", "Hello!")]
_CLONE_NEWUTS = 0x04000000


@pytest.fixture
def _well_known() -> Iterator[None]:
    """This host's name, for what is started meanwhile, means an address that others can reach, as in a container; where
    the name may not be set it stays what it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/uts").open() as own:
        if (address := own_address()) is None or libc.unshare(_CLONE_NEWUTS):
            yield
            return
        socket.sethostname(address)
        yield
        assert not libc.setns(own.fileno(), _CLONE_NEWUTS)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core of its own")
@pytest.mark.usefixtures("_well_known")
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    experts = ["math", "text"]
    tokenizer = demo.model("math") / "tokenizer.json"
    gate = gates.build(tmp_path / "gate.pt", experts=experts, tokenizer=tokenizer, top_k=32)
    common = {"experts": experts, "list_length": 32, "gate": {"file": str(gate)}}
    data = demo.configuration(**common, only={"math": {"tensor_parallel_size": 2}})
    before = set(SHARED.glob("*cpushm*"))
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        both = [greedy([prompt, prompt], Uniform(), 16) for prompt in PROMPTS]
        gated = [greedy([prompt, prompt], Gate(), 16, expert_weights=True) for prompt in PROMPTS]
        alone = [greedy([prompt, []], Single("math"), 16, top_logprobs=4) for prompt in PROMPTS]
        requests = [*both, *gated, *alone]
        parallel = deployment.generate(requests)
        assert [expert.up for expert in deployment.stats().experts] == [True, True]
        assert set(SHARED.glob("*cpushm*")) > before
        found = listening(processes.descendants(os.getpid()))
        assert found and all(address.is_loopback for address in found)
    assert set(SHARED.glob("*cpushm*")) <= before
    data = demo.configuration(**common)
    with LocalDeployment(parse_config(data, directory=demo.DEMO)) as deployment:
        single = deployment.generate(requests)
    for request in requests:
        assert parallel[request.id].tokens == single[request.id].tokens
    for request in alone:
        for one, two in zip(single[request.id].details, parallel[request.id].details, strict=True):
            assert two.logprob == pytest.approx(one.logprob, abs=1e-4)
    for request in gated:
        for one, two in zip(single[request.id].details, parallel[request.id].details, strict=True):
            assert two.coefficients == pytest.approx(one.coefficients, abs=1e-3)
