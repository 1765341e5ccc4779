"""All that is measured over one recording."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.bench.exactness import chi_square, errors, lengths
from tests.bench.exactness.cases import cases
from tests.bench.exactness.driving import driver
from tests.bench.exactness.recording import Recording

TESTED = ("uniform", "uniform, prob")
"""The policies whose tokens are counted, and for which list lengths are compared."""
TESTED_POSITIONS = 3


@dataclass
class Results:
    """Of all recordings."""

    recordings: dict[str, dict[str, int]] = field(default_factory=dict)
    """Name -> positions, experts, tokens of the vocabulary, length of the lists."""
    lines: list[errors.Line] = field(default_factory=list)
    fits: list[chi_square.Fit] = field(default_factory=list)
    lengths: list[lengths.Length] = field(default_factory=list)

    def add(self, step: Sequence[errors.Line] | Sequence[chi_square.Fit] | Sequence[lengths.Length]) -> None:
        """One step's results."""
        for one in step:
            match one:
                case errors.Line():
                    self.lines.append(one)
                case chi_square.Fit():
                    self.fits.append(one)
                case lengths.Length():
                    self.lengths.append(one)


def measure(recording: Recording, found: Results, *, positions: int, list_length: int, draws: int) -> None:
    """Add what `recording` gives to `found`; no chi-square tests without `draws`."""
    began = time.monotonic()
    count, experts, vocabulary = recording.logprobs.shape
    numbers = range(0, count, max(1, count // positions))[:positions]
    found.recordings[recording.name] = {
        "positions": len(numbers),
        "experts": experts,
        "vocabulary": vocabulary,
        "list_length": list_length,
    }
    for part in (
        measured_errors(recording, numbers, list_length),
        measured_fits(recording, list_length, draws) if draws else (),
        measured_lengths(recording, numbers),
    ):
        for step in part:
            found.add(step)
            print(f"{recording.name}: {type(step[0]).__name__} after {time.monotonic() - began:.0f} s", flush=True)


def measured_errors(recording: Recording, numbers: range, list_length: int) -> Iterator[list[errors.Line]]:
    """Policy by policy."""
    with driver(recording, list_length=list_length) as driving:
        for name, case in cases(recording.experts).items():
            yield errors.measure(recording, driving, name, case, numbers)


def measured_fits(recording: Recording, list_length: int, draws: int) -> Iterator[list[chi_square.Fit]]:
    """Position by position and policy by policy."""
    measured = cases(recording.experts)
    with driver(recording, list_length=list_length) as driving:
        for position in chi_square.heaviest(recording, measured["uniform"], list_length, TESTED_POSITIONS):
            for name in TESTED:
                yield chi_square.fit(recording, driving, name, measured[name], position, list_length, draws)


def measured_lengths(recording: Recording, numbers: range) -> Iterator[list[lengths.Length]]:
    """Length by length."""
    measured = cases(recording.experts)
    for length in (min(length, recording.logprobs.shape[-1]) for length in lengths.LENGTHS):
        with driver(recording, list_length=length) as driving:
            yield [lengths.measure(recording, driving, name, measured[name], numbers, length) for name in TESTED]
