"""Results as JSON and as tables."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from server.tools.provenance import about
from tests.bench.exactness.chi_square import Fit
from tests.bench.exactness.errors import ROUNDING, Accuracy, Cost, Line, Spread
from tests.bench.exactness.lengths import ROWS, Length
from tests.bench.exactness.results import Results

SMALL = 1e-6
"""Nats: smaller numbers are what float32 makes of zero."""
COMMAND = "python -m tests.bench.exactness"


def write(found: Results, folder: Path) -> None:
    """exactness.json and exactness.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"about": about() | {"command": f"{COMMAND} {shlex.join(sys.argv[1:])}".strip()}} | asdict(found)
    (folder / "exactness.json").write_text(json.dumps(_rounded(data), indent=1) + "\n", encoding="utf-8")
    (folder / "exactness.md").write_text(markdown(found), encoding="utf-8")


def markdown(found: Results) -> str:
    """The page."""
    parts = [_introduction(found)]
    for name, size in found.recordings.items():
        lines = [line for line in found.lines if line.recording == name]
        parts.append(
            f"## {TITLES.get(name, name)}\n\n"
            f"{size['experts']} experts, {size['vocabulary']:,} tokens, {size['positions']} positions, lists of "
            f"{size['list_length']}.\n\n{_errors(lines)}\n\n{_costs(lines)}"
        )
    if found.fits:
        parts.append(_fits(found.fits))
    parts.append(_lengths(found.lengths))
    return "\n\n".join(parts) + f"\n\nMade by `{COMMAND}` ([raw results](exactness.json)).\n"


TITLES = {"smollm2": "SmolLM2-135M", "random": "Random weights, the vocabulary of a large model"}


def _introduction(found: Results) -> str:
    violations = sum(line.unasked.violations + line.asked.violations + line.shown.violations for line in found.lines)
    checked = sum(3 * found.recordings[line.recording]["positions"] for line in found.lines)
    over = f"{violations:,} were" if violations else "none was"
    return f"""# How exact the fused distribution is

The server's own coordinator and workers, over distributions that transformers computed in float32 along sampled text:
25 prompts, of SmolLM2 open-ended questions, with 20 tokens each, at temperature 1 from the uniform fusion. The
reference is fusion over the whole vocabulary in float64. Errors and bounds are in nats, tolerance 0.001.

"Before" is what lists of 32 gave, normalised over what they held: the error of every log-probability. "Lists alone" is
what a sequence gets that wants no log-probabilities. Its tokens are sampled exactly all the same; the error is that of
its log-probabilities in a record, at the temperature that it samples at. "With log-probabilities" whole rows are asked
for where the bound is above the tolerance. Clients are shown log-probabilities at temperature 1.

Each error stands beside the bound that the coordinator computed for it. Of {checked:,} errors {over} above its bound by
more than rounding explains ({ROUNDING:g} nats)."""


def _errors(lines: Iterable[Line]) -> str:
    rows = [
        [
            line.policy,
            f"{line.temperature:g}",
            _spread(line.before),
            _spread(line.unasked.error),
            _bound(line.unasked),
            _spread(line.asked.error),
            _bound(line.asked),
            _spread(line.shown.error),
            _bound(line.shown),
        ]
        for line in lines
    ]
    head = [
        "policy",
        "temperature",
        "before: mean / p99 / max",
        "lists alone: error",
        "bound: mean / max",
        "with log-probabilities: error",
        "bound: mean / max",
        "shown to clients: error",
        "bound: mean / max",
    ]
    return table(head, rows)


def _costs(lines: Iterable[Line]) -> str:
    rows = [
        [line.policy, f"{line.temperature:g}", *map(_cost, (line.greedy, line.sampled, line.logprobs))]
        for line in lines
    ]
    return (
        "Share of tokens that asked for whole rows, and KB a token from all experts together, lists and rows:\n\n"
        + table(["policy", "temperature", "greedy", "sampled", "sampled, with log-probabilities"], rows)
    )


def _fits(fits: list[Fit]) -> str:
    rows = [
        [
            fit.policy,
            str(fit.position),
            f"{fit.temperature:g}",
            f"{fit.draws:,}",
            str(fit.cells),
            f"{fit.statistic:.1f}",
            f"{fit.p_value:.3f}",
            f"{fit.outside_expected:.4f} / {fit.outside_drawn:.4f}",
            f"{fit.asked:.1%}",
        ]
        for fit in fits
    ]
    head = [
        "policy",
        "position",
        "temperature",
        "draws",
        "cells",
        "chi-square",
        "p",
        "outside of the lists: due / drawn",
        "asked for rows",
    ]
    return (
        "## Sampled tokens against the law\n\nSmolLM2, at the positions with the heaviest tails; tokens that no list "
        "holds are cells like all others.\n\n" + table(head, rows)
    )


def _lengths(lengths: list[Length]) -> str:
    rows = [
        [
            TITLES.get(one.recording, one.recording),
            one.policy,
            str(one.length),
            _cost(one.greedy),
            _cost(one.sampled),
            f"{one.top_k_ms:.2f}",
        ]
        for one in lengths
    ]
    return (
        "## The length of lists\n\nShare of tokens that asked for whole rows, KB a token from all experts together, at "
        f"temperature 1 where sampled; milliseconds of one expert's `torch.topk` for {ROWS} rows on one thread.\n\n"
        + table(["models", "policy", "length", "greedy", "sampled", "top-k, ms"], rows)
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown; the first two columns to the left."""
    rule = ["---", "---"] + ["---:"] * (len(head) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _spread(spread: Spread) -> str:
    return " / ".join(map(_number, (spread.mean, spread.p99, spread.largest)))


def _bound(accuracy: Accuracy) -> str:
    return f"{_number(accuracy.bound.mean)} / {_number(accuracy.bound.largest)}"


def _number(value: float) -> str:
    if value < SMALL:
        return "0" if value == 0 else f"<{SMALL:g}".replace("e-0", "e-")
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def _cost(cost: Cost) -> str:
    asked = sum(cost.asked.values())
    return f"{asked:.1%}, {cost.lists / 1000:.1f} + {cost.rows / 1000:.0f} KB"


def _rounded(value: object) -> object:
    """With six significant digits."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: _rounded(one) for key, one in value.items()}
        case list() | tuple():
            return [_rounded(one) for one in value]
    return value
