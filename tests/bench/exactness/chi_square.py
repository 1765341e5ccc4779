"""Whether sampled tokens follow the full fused law: Pearson's chi-square test, the tokens that no list holds among its
cells."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt
from scipy import stats

from tests.bench.exactness import law
from tests.bench.exactness.cases import Case
from tests.bench.exactness.driving import TOGETHER, Driver
from tests.bench.exactness.recording import Recording

TEMPERATURES = (1.0, 1.5)
RUN_TOKENS = 10
OWN_CELL = 20.0
"""A token that is expected so often has a cell of its own."""
SHARED_CELLS = 16
"""How many cells share the rarer tokens, those that a list holds and those that none does each."""
LEAST = 5.0
"""A cell must be expected so often to count by itself."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One test."""

    policy: str
    position: int
    temperature: float
    draws: int
    cells: int
    statistic: float
    p_value: float
    outside_expected: float
    """Share of the draws that should be of tokens that no list holds."""
    outside_drawn: float
    """Share that was."""
    asked: float
    """Share that asked for whole rows."""


def heaviest(recording: Recording, case: Case, list_length: int, count: int) -> list[int]:
    """The positions whose law leaves most outside of the lists."""
    positions = range(len(recording.logprobs))
    left = [
        law.missing_nats(
            law.decided(recording, case, number).logprobs[0].numpy(), law.listed(recording, number, list_length)
        )
        for number in positions
    ]
    return [int(number) for number in np.argsort(left)[::-1][:count]]


def fit(
    recording: Recording, driver: Driver, name: str, case: Case, position: int, list_length: int, draws: int
) -> list[Fit]:
    """A test at each temperature."""
    return [_fit(recording, driver, name, case, position, heat, list_length, draws) for heat in TEMPERATURES]


def _fit(
    recording: Recording,
    driver: Driver,
    name: str,
    case: Case,
    position: int,
    temperature: float,
    list_length: int,
    draws: int,
) -> Fit:
    expected = np.exp(law.heated(law.decided(recording, case, position).logprobs[0].numpy(), temperature))
    outside = np.ones(len(expected), bool)
    outside[law.listed(recording, position, list_length)] = False
    seed = crc32(f"{name} {position} {temperature}".encode()) << 20  # no two tests share random numbers
    counts, asked = _counts(driver, case, position, temperature, draws, len(expected), seed)
    cells = _cells(expected * counts.sum(), outside)
    found, due = np.bincount(cells, counts), np.bincount(cells, expected * counts.sum())
    found, due = _without_small(found, due)
    statistic, p_value = stats.chisquare(found, due * found.sum() / due.sum())
    return Fit(
        policy=name,
        position=position,
        temperature=temperature,
        draws=int(counts.sum()),
        cells=len(due),
        statistic=float(statistic),
        p_value=float(p_value),
        outside_expected=float(expected[outside].sum()),
        outside_drawn=float(counts[outside].sum() / counts.sum()),
        asked=asked,
    )


def _counts(
    driver: Driver, case: Case, position: int, temperature: float, draws: int, vocabulary: int, seed: int
) -> tuple[npt.NDArray[np.int64], float]:
    """int64[V]: how often each token was drawn; the share of the draws that asked for rows."""
    counts, asked = np.zeros(vocabulary, np.int64), 0
    while (drawn := int(counts.sum())) < draws:
        sequences = min(TOGETHER, -(-(draws - drawn) // RUN_TOKENS))
        requests = [
            driver.request(position, case(position).policy, temperature, seed + number, RUN_TOKENS)
            for number in range(sequences)
        ]
        seed += sequences
        answers, usage = driver.run(requests)
        np.add.at(counts, np.concatenate(answers), 1)
        asked += sum(usage.asked.values())
    return counts, asked / drawn


def _cells(due: npt.NDArray[np.float64], outside: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """int64[V]: the cell of each token. Which tokens share one depends on their ids alone."""
    ids = np.arange(len(due))
    cells = ids % SHARED_CELLS + SHARED_CELLS * outside
    own = due >= OWN_CELL
    cells[own] = 2 * SHARED_CELLS + np.arange(own.sum())
    return cells


def _without_small(
    found: npt.NDArray[np.float64], due: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The cells that are expected often enough, and one of all the others together, if that is."""
    small = due < LEAST
    rest = (found[small].sum(), due[small].sum())
    found, due = found[~small], due[~small]
    if rest[1] >= LEAST:
        found, due = np.append(found, rest[0]), np.append(due, rest[1])
    return found, due
