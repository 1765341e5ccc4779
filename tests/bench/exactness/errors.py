"""How far reported log-probabilities are from the law, and how often whole rows are asked for.

At each position of a recording a token is sampled by the real coordinator. Its log-probability under the law that it
was drawn from is compared with the law itself, float64 over the whole vocabulary. "Before": lists of 32, normalised
over what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.bench.exactness import law
from tests.bench.exactness.cases import Case, Variant
from tests.bench.exactness.driving import Driver, Observed
from tests.bench.exactness.recording import Recording
from tests.support.oracle.huggingface import Decision

TEMPERATURES = (0.3, 0.7, 1.0, 1.5, 2.0)
ROUNDING = 2e-5
"""What float32 may do to a sum of log-probabilities of up to a hundred nats, in nats."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many numbers."""

    mean: float
    p99: float
    largest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(float(np.mean(values)), float(np.quantile(values, 0.99)), float(np.max(values)))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors beside their bounds, in nats, over all positions."""

    error: Spread
    bound: Spread
    excess: float
    """The most by which an error was above its bound; negative where none was."""
    violations: int
    """Errors above the bound and what rounding explains."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a token takes on average."""

    asked: dict[str, float]
    """Reason -> share of the tokens for which whole rows were asked for."""
    lists: float
    """Bytes of lists that came from all experts."""
    rows: float
    """Bytes of whole rows."""


@dataclass(frozen=True, slots=True)
class Line:
    """One policy at one temperature."""

    recording: str
    policy: str
    temperature: float
    before: Spread
    """Errors of lists of 32 alone."""
    unasked: Accuracy
    """Of records of sequences that want no log-probabilities: what lists say, and rows that tokens needed."""
    asked: Accuracy
    """Of records of sequences that want log-probabilities."""
    shown: Accuracy
    """Of the log-probabilities that a client is shown, which are those at temperature 1."""
    greedy: Cost
    sampled: Cost
    logprobs: Cost
    """Sampled, with log-probabilities."""


@dataclass(frozen=True, slots=True)
class _Position:
    """One position under one case."""

    number: int
    variant: Variant
    decision: Decision
    heated: law.Float64
    """[V]: the law that tokens are drawn from."""


def measure(recording: Recording, driver: Driver, name: str, case: Case, positions: range) -> list[Line]:
    """A line for each temperature. The greedy cost does not depend on it."""
    greedy = cost(driver, case, positions, 0.0)
    return [_line(recording, driver, name, case, positions, temperature, greedy) for temperature in TEMPERATURES]


def cost(driver: Driver, case: Case, positions: range, temperature: float, top_logprobs: int | None = None) -> Cost:
    """One token at each position."""
    requests = [
        driver.request(number, case(number).policy, temperature, seed=number, top_logprobs=top_logprobs)
        for number in positions
    ]
    _, usage = driver.run(requests)
    return Cost(
        {reason: count / usage.tokens for reason, count in usage.asked.items()},
        usage.received["lists"] / usage.tokens,
        usage.received["rows"] / usage.tokens,
    )


def _line(
    recording: Recording,
    driver: Driver,
    name: str,
    case: Case,
    positions: range,
    temperature: float,
    greedy: Cost,
) -> Line:
    before: list[float] = []
    pairs: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # (error, bound)
    shown: list[tuple[float, float]] = []
    for number in positions:
        decision = law.decided(recording, case, number)
        logprobs = decision.logprobs[0].numpy()
        here = _Position(number, case(number), decision, law.heated(logprobs, temperature))
        before.append(law.missing_nats(here.heated, law.listed(recording, number, law.BEFORE_K)))
        for wanted in (False, True):
            top = 0 if wanted else None
            request = driver.request(number, here.variant.policy, temperature, number, record=True, top_logprobs=top)
            observed = driver.observe(request)
            pairs[wanted].append((_error(here, observed, temperature), observed.bound(temperature)))
            if wanted:
                shown.append((abs(observed.details.logprob - logprobs[observed.token]), observed.bound(1.0)))
    return Line(
        recording=recording.name,
        policy=name,
        temperature=temperature,
        before=Spread.of(before),
        unasked=_accuracy(pairs[False]),
        asked=_accuracy(pairs[True]),
        shown=_accuracy(shown),
        greedy=greedy,
        sampled=cost(driver, case, positions, temperature),
        logprobs=cost(driver, case, positions, temperature, top_logprobs=0),
    )


def _error(here: _Position, observed: Observed, temperature: float) -> float:
    """Of the token's log-probability as it follows from the record."""
    logprobs = np.frombuffer(observed.record.token_logprobs, np.float32).astype(np.float64)  # [E]
    coefficients = here.decision.coefficients[0].numpy()
    counted = coefficients != 0
    if here.variant.space == "prob":
        score = np.log((coefficients[counted] * np.exp(logprobs[counted])).sum())
    else:
        score = float((coefficients[counted] * logprobs[counted]).sum())
    normaliser = float(np.frombuffer(observed.record.log_normaliser, np.float32)[0])
    return abs(score / temperature - normaliser - here.heated[observed.token])


def _accuracy(pairs: list[tuple[float, float]]) -> Accuracy:
    errors, bounds = zip(*pairs, strict=True)
    over = np.subtract(errors, bounds)
    return Accuracy(Spread.of(errors), Spread.of(bounds), float(over.max()), int((over > ROUNDING).sum()))
