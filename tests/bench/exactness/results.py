"""All that is measured over one recording."""

from __future__ import annotations

import time
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
    measured = cases(recording.experts)
    with driver(recording, list_length=list_length) as driving:
        for name, case in measured.items():
            found.lines += errors.measure(recording, driving, name, case, numbers)
            print(f"{recording.name}: {name} done after {time.monotonic() - began:.0f} s", flush=True)
        for position in chi_square.heaviest(recording, measured["uniform"], list_length, TESTED_POSITIONS):
            for name in TESTED if draws else ():
                found.fits += chi_square.fit(recording, driving, name, measured[name], position, list_length, draws)
                print(f"{recording.name}: position {position} after {time.monotonic() - began:.0f} s", flush=True)
    for length in lengths.LENGTHS:
        with driver(recording, list_length=min(length, vocabulary)) as driving:
            for name in TESTED:
                case = measured[name]
                found.lengths.append(lengths.measure(recording, driving, name, case, numbers, min(length, vocabulary)))
        print(f"{recording.name}: lists of {length} after {time.monotonic() - began:.0f} s", flush=True)
