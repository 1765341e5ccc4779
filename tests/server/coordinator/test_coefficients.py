"""What each policy makes of what the experts said, and what is left when experts are not available."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as scipy_entropy

from server.coordinator.coefficients import Evidence, coefficients, plausibility, space
from server.policy import (
    Contrastive,
    FusionRoute,
    Gate,
    Perplexity,
    Product,
    Proxy,
    Select,
    Single,
    Uniform,
    Weights,
)

EXPERTS = ["a", "b", "c"]
ROWS, VOCABULARY = 9, 20


def evidence(seed: int = 0, lost: dict[int, list[int]] | None = None) -> Evidence:
    """Of random rows; `lost`: row -> experts that are not available there."""
    rng = np.random.default_rng(seed)
    logprobs = np.sort(log_softmax(2 * rng.normal(size=(ROWS, 3, VOCABULARY)), axis=-1), axis=-1)[..., ::-1]
    available = np.ones((ROWS, 3), bool)
    for row, experts in (lost or {}).items():
        available[row, experts] = False
    return Evidence(
        available=available,
        confidence=logprobs[:, :, 0].astype(np.float32),
        entropy=scipy_entropy(np.exp(logprobs), axis=-1).astype(np.float32),
        gate=softmax(rng.normal(size=(ROWS, 3)), axis=1).astype(np.float32),
        cross_entropy=rng.uniform(0.5, 4, (ROWS, 3)).astype(np.float32),
    )


def rule(policy, given: Evidence | None = None) -> np.ndarray:
    found = coefficients(policy, EXPERTS, given or evidence())
    assert found.dtype == np.float32 and found.shape == (ROWS, 3)
    return found


@pytest.mark.parametrize(
    ("policy", "row"),
    [
        (Uniform(), [1 / 3] * 3),
        (Uniform("prob"), [1 / 3] * 3),
        (Product(), [1, 1, 1]),
        (Weights({"c": 2.0, "a": -0.5}), [-0.5, 0, 2]),
        (Single("b"), [0, 1, 0]),
        (Contrastive("c", "a", mu=0.25), [-0.25, 0, 1]),
        (Proxy("a", "c", "b", alpha=1.5), [1, -1.5, 1.5]),
        (Proxy("a", "c", "a", alpha=0.25), [0.75, 0, 0.25]),
        (Proxy("a", "a", "b", alpha=2.0), [3, -2, 0]),
    ],
)
def test_constant_rules(policy, row):
    np.testing.assert_allclose(rule(policy), [row] * ROWS, rtol=1e-6)


def test_the_gate_is_taken_as_it_is():
    given = evidence(1)
    np.testing.assert_array_equal(rule(Gate(), given), given.gate)


def test_select_takes_one_expert_a_row():
    given = evidence(2)
    winners = {
        "confidence": given.confidence.argmax(axis=1),
        "entropy": given.entropy.argmin(axis=1),
        "gate": given.gate.argmax(axis=1),
    }
    for by, winner in winners.items():
        assert len(set(winner.tolist())) > 1
        np.testing.assert_array_equal(rule(Select(by), given), np.eye(3)[winner])


def test_select_takes_none_that_is_lost():
    lost = {row: [int(np.asarray(evidence(3).gate)[row].argmax())] for row in range(ROWS)}
    given = evidence(3, lost)
    for by in ("gate", "entropy", "confidence"):
        found = rule(Select(by), given)
        np.testing.assert_array_equal(found.sum(axis=1), 1)
        assert not found[~given.available].any()
    second = [int(np.argsort(given.gate[row])[1]) for row in range(ROWS)]
    np.testing.assert_array_equal(rule(Select("gate"), given), np.eye(3)[second])


def test_the_route_is_the_router_and_the_best_of_the_others():
    given = evidence(4)
    found = rule(FusionRoute("b"), given)
    for row in range(ROWS):
        best = 0 if given.gate[row, 0] > given.gate[row, 2] else 2
        assert found[row].tolist() == [float(best == 0), 1.0, float(best == 2)]
    assert given.gate.argmax(axis=1).tolist().count(1) > 0  # the gate likes the router best somewhere


@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
def test_perplexity_is_a_softmax_of_minus_the_cross_entropy(tau):
    given = evidence(5)
    np.testing.assert_allclose(
        rule(Perplexity(tau), given), softmax(-given.cross_entropy.astype(np.float64) / tau, axis=1), rtol=1e-5
    )


def test_lost_shares_go_to_the_others_in_proportion():
    lost = {1: [0], 2: [1, 2], 5: [2]}
    given = evidence(6, lost)
    gate = given.gate.astype(np.float64)
    for policy, wanted in (
        (Uniform(), np.full((ROWS, 3), 1 / 3)),
        (Weights({"a": 1.0, "b": 2.0, "c": 3.0}), np.tile([1.0, 2.0, 3.0], (ROWS, 1))),
        (Gate(), gate),
        (Perplexity(), softmax(-given.cross_entropy.astype(np.float64), axis=1)),
    ):
        found = rule(policy, given)
        for row in range(ROWS):
            gone = lost.get(row, [])
            expected = wanted[row].copy()
            expected[gone] = 0
            expected *= wanted[row].sum() / expected.sum()
            np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_coefficients_that_are_no_shares_are_not_rescaled():
    given = evidence(7, {0: [1], 1: [2], 2: [0]})
    np.testing.assert_allclose(rule(Contrastive("a", "b", mu=0.5), given)[:2], [[1, 0, 0], [1, -0.5, 0]])
    np.testing.assert_allclose(rule(Product(), given)[:3], [[1, 0, 1], [1, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(rule(Proxy("a", "b", "c"), given)[:3], [[1, 0, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "policy", [Contrastive("a", "b", mu=0.5), Proxy("a", "b", "c"), Single("a"), FusionRoute("a")], ids=str
)
def test_nothing_is_left_without_the_expert_that_leads(policy):
    """What contrastive decoding leaves without its expert, say, is only a dislike of what the amateur likes."""
    found = rule(policy, evidence(8, {0: [0], 1: [2]}))
    assert found[0].tolist() == [0, 0, 0]
    assert found[1, 0] == 1


def test_experts_that_are_left_share_equally_when_all_with_weight_are_lost():
    given = evidence(9, {0: [1], 1: [0, 1], 2: [0]})
    np.testing.assert_allclose(rule(Weights({"b": 3.0}), given)[:3], [[0.5, 0, 0.5], [0, 0, 1], [0, 3, 0]])


@pytest.mark.parametrize(
    "policy",
    [Uniform(), Product(), Perplexity(), Select("entropy"), Select("gate"), Gate(), FusionRoute("a"), Single("a")],
    ids=str,
)
def test_nothing_is_left_when_all_experts_are_lost(policy):
    found = rule(policy, evidence(10, {4: [0, 1, 2]}))
    assert found[4].tolist() == [0, 0, 0]
    assert (found[3] != 0).any()


@pytest.mark.parametrize("policy", [Uniform(), Perplexity(), Gate(), Select("entropy"), FusionRoute("a")], ids=str)
def test_a_lost_expert_in_one_row_changes_no_other_row(policy):
    whole, lost = rule(policy, evidence(11)), rule(policy, evidence(11, {2: [1]}))
    others = np.arange(ROWS) != 2
    np.testing.assert_array_equal(whole[others], lost[others])


def test_some_rows_of_the_evidence():
    given, which = evidence(12, {3: [1]}), np.array([3, 5])
    some = given.only(which)
    for name in ("available", "confidence", "entropy", "gate", "cross_entropy"):
        np.testing.assert_array_equal(getattr(some, name), getattr(given, name)[which])
    for policy in (Uniform(), Gate(), Select("entropy"), Perplexity()):
        np.testing.assert_array_equal(coefficients(policy, EXPERTS, some), rule(policy, given)[which])


def test_plausibility_is_the_leader_and_the_log_of_a_share():
    assert plausibility(Contrastive("b", "a", plausibility=0.2), EXPERTS) == (1, pytest.approx(math.log(0.2)))
    assert plausibility(Contrastive("c", "a", plausibility=1.0), EXPERTS) == (2, 0.0)
    leader, everything = plausibility(Contrastive("a", "b", plausibility=0.0), EXPERTS)
    assert leader == 0 and math.isfinite(everything) and everything < -60
    for policy in (Uniform(), Single("a"), Proxy("a", "b", "c"), Weights({"a": 1.5, "b": -0.5})):
        assert plausibility(policy, EXPERTS) == (-1, 0.0)


def test_spaces():
    assert [space(policy, "prob") for policy in (Gate(), Uniform("prob"), Weights({"a": 1.0}, "prob"))] == ["prob"] * 3
    assert space(Perplexity(space="prob"), "logprob") == "prob"
    for policy in (Uniform(), Product(), Select(), Single("a"), Contrastive("a", "b"), FusionRoute("a")):
        assert space(policy, "prob") == "logprob"
    assert space(Gate(), "logprob") == "logprob"
