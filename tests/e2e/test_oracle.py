"""The served tokens are those of Hugging Face transformers: float32, fused over the full vocabulary by the oracle's own
loop. Two implementations round differently, so a first difference may stand where the oracle's two best candidates are
closer than 1e-4 nats; such ties are counted and must stay few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from server.launch.local import LocalDeployment
from tests.support import demo
from tests.support.oracle.cases import FUSED
from tests.support.oracle.compare import compare
from tests.support.oracle.huggingface import Reference
from tests.support.sequences import greedy

PROMPTS = 100
TOKENS = 48
MAX_TIES = 5
SYSTEM = "You are a careful assistant. Answer in as few words as you can."


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> list[list[list[int]]]:
    """For each row, each expert's prompt; the last expert has a system prompt of its own in every third row."""
    rows = []
    for number, messages in enumerate(demo.conversations(PROMPTS)):
        plain = reference.encode(messages)
        own = reference.encode([{"role": "system", "content": SYSTEM}, *messages]) if number % 3 == 0 else plain
        rows.append([plain, plain, own])
    return rows


@pytest.mark.parametrize("case", FUSED)
def test_greedy_tokens_equal_transformers(
    case: str,
    whole: LocalDeployment,
    whole_gate: Path,
    reference: Reference,
    prompts: list[list[list[int]]],
    record_property: Callable[[str, object], None],
) -> None:
    policy, make_rule = FUSED[case]
    requests = [greedy(row, policy, TOKENS) for row in prompts]
    results = whole.generate(requests)
    served = [results[request.id].tokens for request in requests]
    result = compare(served, reference.decode(prompts, make_rule(whole_gate), TOKENS))
    record_property("positions", result.equal)
    record_property("ties", len(result.ties))
    print(f"\n{case}: {result.equal} of {PROMPTS * TOKENS} positions equal, {len(result.ties)} ties")
    assert not result.wrong
    assert len(result.ties) <= MAX_TIES
    assert result.equal >= 0.9 * PROMPTS * TOKENS
    assert len({tuple(tokens) for tokens in served}) > PROMPTS // 2  # the answers depend on the prompts
