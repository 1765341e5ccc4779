"""Tokens are sampled from the distribution that the server reports, and a seed fixes them whatever else runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chisquare

from server.launch.local import LocalDeployment
from server.policy import Gate, Policy, Uniform
from server.request import SequenceRequest
from tests.support import demo
from tests.support.oracle.huggingface import Reference
from tests.support.sequences import greedy, sampled

SAMPLES = 10_000
BATCH = 2_000
SIGNIFICANCE = 0.001
FEWEST = 5.0  # expected samples in a bin of a chi-square test


HEATED = [2.0, 2.5, 3.0]
"""Temperatures of the experts' own distributions, which are too sure to fill many bins."""


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> list[list[int]]:
    return [reference.encode([{"role": "user", "content": "Hi"}])] * 3


@pytest.mark.parametrize("policy", [Gate(), Uniform(space="prob")], ids=["gate", "mixture"])
def test_samples_follow_the_served_distribution(
    policy: Policy, whole: LocalDeployment, prompts: list[list[int]]
) -> None:
    probabilities = served_distribution(whole, prompts, policy)
    samples = SAMPLES if isinstance(policy, Gate) else SAMPLES // 2
    p = chi_square(sample(whole, prompts, policy, samples, temperature=1.0), probabilities)
    print(f"\n{samples} samples over {(probabilities * samples >= FEWEST).sum()} bins: p = {p:.3f}")
    assert p > SIGNIFICANCE


def test_temperature_and_top_p_shape_the_distribution(whole: LocalDeployment, prompts: list[list[int]]) -> None:
    temperature, top_p = 1.3, 0.9
    shaped = served_distribution(whole, prompts, Gate()) ** (1 / temperature)
    shaped /= shaped.sum()
    order = np.argsort(-shaped)
    shaped[order[np.cumsum(shaped[order]) - shaped[order] >= top_p]] = 0
    counts = sample(whole, prompts, Gate(), SAMPLES // 2, temperature=temperature, top_p=top_p)
    assert chi_square(counts, shaped / shaped.sum()) > SIGNIFICANCE


def test_a_wrong_distribution_would_be_noticed(whole: LocalDeployment, prompts: list[list[int]]) -> None:
    """Samples at temperature 1.1 are not taken for samples at temperature 1."""
    counts = sample(whole, prompts, Gate(), SAMPLES // 2, temperature=1.1)
    assert chi_square(counts, served_distribution(whole, prompts, Gate())) < SIGNIFICANCE


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(whole: LocalDeployment, reference: Reference) -> None:
    conversations = [[reference.encode(messages)] * 3 for messages in demo.conversations(16)]

    def request(number: int, seed: int) -> SequenceRequest:
        return sampled(conversations[number], Gate(), 40, seed=seed)

    alone = run(whole, [request(0, seed=99)])[0]
    batch = run(whole, [request(number, seed=99) for number in range(16)])
    assert batch[0] == alone
    assert len({tuple(tokens) for tokens in batch}) == 16
    others = [request(number % 16, seed=number) for number in range(60)]
    assert run(whole, [*others[:30], request(0, seed=99), *others[30:]])[30] == alone
    assert run(whole, [request(0, seed=100)])[0] != alone


def run(deployment: LocalDeployment, requests: list[SequenceRequest]) -> list[list[int]]:
    results = deployment.generate(requests)
    return [results[request.id].tokens for request in requests]


def served_distribution(
    deployment: LocalDeployment, prompts: list[list[int]], policy: Policy
) -> npt.NDArray[np.float64]:
    """float64[V]: what the server says about the first token."""
    request = greedy(prompts, policy, 1, top_logprobs=demo.VOCABULARY, temperatures=HEATED)
    probabilities = np.zeros(demo.VOCABULARY)
    for token, logprob in deployment.generate([request])[request.id].details[0].top:
        probabilities[token] = np.exp(logprob)
    assert abs(probabilities.sum() - 1) < 1e-5
    return probabilities / probabilities.sum()


def sample(
    deployment: LocalDeployment, prompts: list[list[int]], policy: Policy, samples: int, **sampling: float
) -> npt.NDArray[np.int64]:
    """int64[V]: how often each token came first, over `samples` consecutive seeds."""
    counts: Counter[int] = Counter()
    for start in range(0, samples, BATCH):
        seeds = range(start, min(start + BATCH, samples))
        requests = [sampled(prompts, policy, 1, seed=seed, temperatures=HEATED, **sampling) for seed in seeds]
        counts.update(tokens[0] for tokens in run(deployment, requests))
    return np.array([counts[token] for token in range(demo.VOCABULARY)])


def chi_square(counts: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    """p-value of `counts` under `probabilities`; tokens with too few expected samples make one bin together."""
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    large = expected >= FEWEST
    rest, rest_expected = counts[~large].sum(), expected[~large].sum()
    observed, wanted = counts[large], expected[large]
    if rest_expected >= 1:
        observed, wanted = np.append(observed, rest), np.append(wanted, rest_expected)
    else:
        assert rest < 10
        wanted = wanted * observed.sum() / wanted.sum()
    assert len(observed) >= 8
    return float(chisquare(observed, wanted).pvalue)
