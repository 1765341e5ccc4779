"""How exact the fused distribution is, and what that takes: `python -m tests.bench.exactness`.

Drives the coordinator and the workers themselves over recorded distributions of SmolLM2 (49,152 tokens, three experts:
`deploy.smollm2.fetch` and `deploy.smollm2.adapters` make them) and of two models with random weights (151,936 tokens:
`tests.bench.random_model`), at 500 and 100 positions of sampled text. Against fusion over the whole vocabulary in
float64: errors of log-probabilities beside the computed bounds, for every policy and temperatures from 0.3 to 2; a
chi-square test of the tokens; what lists of other lengths cost. Writes JSON and tables to docs/benchmarks/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gate.options import run_module, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactnessOptions:
    """Of `python -m tests.bench.exactness`."""

    smollm2: Path = Path("build/smollm2")
    """Folder of the models base and style."""
    random: Path = Path("build/bench-152k")
    """Folder of the models a and b with random weights."""
    recordings: Path = Path("build/exactness")
    """Folder of the recorded distributions; they are made if they are not there, 900 MB."""
    positions: Annotated[int, whole(8)] = 500
    """At how many positions of SmolLM2's text."""
    random_positions: Annotated[int, whole(8)] = 100
    """At how many of the random models'."""
    draws: Annotated[int, whole(100)] = 20_000
    """Of each chi-square test."""
    list_length: Annotated[int, whole(2)] = 128
    """Of the experts' lists."""
    output: Path = Path("docs/benchmarks")
    """Folder of the results."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m tests.bench.exactness", __doc__, ExactnessOptions, run, arguments)


def run(options: ExactnessOptions) -> None:
    """Run the command."""
    from tests.bench.exactness import recording, report, results

    found = results.Results()
    real = recording.load("smollm2", options.recordings, lambda: recording.smollm2(options.smollm2))
    results.measure(real, found, positions=options.positions, list_length=options.list_length, draws=options.draws)
    random = recording.load("random", options.recordings, lambda: recording.random_pair(options.random))
    results.measure(random, found, positions=options.random_positions, list_length=options.list_length, draws=0)
    report.write(found, options.output)


if __name__ == "__main__":
    main()
