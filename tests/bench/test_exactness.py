"""Exactness over a small made-up recording: errors within their bounds, tokens that follow the law."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench.exactness import chi_square, law, report, results
from tests.bench.exactness.cases import cases
from tests.bench.exactness.recording import Recording

POSITIONS, VOCABULARY, LISTED = 10, 400, 40


@pytest.fixture(scope="module")
def recording() -> Recording:
    numbers = np.random.default_rng(3)
    shared = 2.5 * numbers.normal(size=(POSITIONS, 1, VOCABULARY))
    logits = shared + numbers.normal(size=(POSITIONS, 3, VOCABULARY))
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return Recording("small", ["a", "b", "c"], logprobs.astype(np.float32))


@pytest.fixture(scope="module")
def found(recording: Recording) -> results.Results:
    found = results.Results()
    results.measure(recording, found, positions=POSITIONS, list_length=LISTED, draws=2000)
    return found


def test_no_error_is_above_its_bound(found: results.Results) -> None:
    assert {line.policy for line in found.lines} == set(cases(["a", "b", "c"]))
    for line in found.lines:
        assert line.unasked.violations == line.asked.violations == line.shown.violations == 0, line
        assert max(line.asked.error.largest, line.shown.error.largest) < 1e-3
    assert max(line.before.largest for line in found.lines) > 0.05


def test_tokens_follow_the_law(found: results.Results) -> None:
    assert len(found.fits) == 2 * len(chi_square.TEMPERATURES) * results.TESTED_POSITIONS
    for fit in found.fits:
        assert fit.p_value > 1e-4, fit
        assert fit.draws == 2000 and fit.cells > 10 and fit.outside_expected > 0.05


def test_longer_lists_ask_less(found: results.Results) -> None:
    sampled = [sum(one.sampled.asked.values()) for one in found.lengths if one.policy == "uniform"]
    assert sampled == sorted(sampled, reverse=True) and sampled[0] > sampled[-1] == 0


def test_what_lists_of_32_miss(recording: Recording) -> None:
    here = law.decided(recording, cases(recording.experts)["uniform"], 0).logprobs[0].numpy()
    kept = law.listed(recording, 0, law.BEFORE_K)
    assert law.missing_nats(here, kept) == pytest.approx(-np.log(np.exp(here[kept]).sum()))
    assert law.missing_nats(here, np.arange(VOCABULARY)) == pytest.approx(0, abs=1e-12)


def test_results_are_written(found: results.Results, tmp_path: Path) -> None:
    report.write(found, tmp_path)
    data = json.loads((tmp_path / "exactness.json").read_text(encoding="utf-8"))
    assert len(data["lines"]) == len(found.lines)
    assert "| uniform, prob | 1.5 |" in (tmp_path / "exactness.md").read_text(encoding="utf-8")
