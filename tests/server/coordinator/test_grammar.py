"""Masked rows: no policy chooses a token that the grammar forbids, however short or long the experts' lists are."""

from __future__ import annotations

import pytest

from server.policy import Contrastive, Product, Select, Single, Uniform, Weights
from server.request import FinishReason
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import NO_GRAMMAR, VOCABULARY, Behaviour, FakeEngine

STOP = 40
WIDE = " ".join(map(str, range(20, 39)))
GRAMMAR = f"1 2 3|{WIDE}|4"
"""Three tokens are allowed, then nineteen, then one, and so on."""
POLICIES = [
    Uniform(),
    Uniform(space="prob"),
    Product(),
    Single("a"),
    Select(by="confidence"),
    Select(by="entropy"),
    Weights({"a": 1.5, "b": -0.5}),
    Contrastive(expert="a", amateur="b"),
]


def allowed(grammar: str, position: int) -> set[int]:
    choices = grammar.split("|")
    return set(map(int, choices[position % len(choices)].split()))


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("length", [2, 8, VOCABULARY])
def test_no_forbidden_token(tmp_path, rng, models, length, temperature):
    engines = [FakeEngine(model, Behaviour(chunk=chunk)) for model, chunk in zip(models, (7, 11), strict=True)]
    with Deployment(tmp_path, engines, list_length=length) as deployment:
        requests = [
            request(
                rng,
                tuple(rng.integers(1, 50, 2)),
                policy,
                stop_token_ids=[STOP],
                logit_bias={5: 100.0, 6: -100.0},
                temperature=temperature,
                presence_penalty=2.0,
                grammar=GRAMMAR,
                top_logprobs=5,
            )
            for policy in POLICIES
        ]
        deployment.run(*requests)
        stats = deployment.stats()
    assert stats.readded > 0
    assert all(expert.masked_rows == 0 for expert in stats.experts)
    for each in requests:
        assert deployment.ended[each.id].reason is FinishReason.LENGTH
        for position, token in enumerate(deployment.tokens[each.id]):
            possible = allowed(GRAMMAR, position)
            assert token in possible, each.policy
            alternatives = {other for other, _ in deployment.details[each.id][position].top}
            assert alternatives <= possible, each.policy
            assert len(alternatives) == min(5, len(possible)) or isinstance(each.policy, Contrastive)


@pytest.mark.parametrize("min_tokens", [0, 9])
def test_ends_where_the_grammar_ends(tmp_path, rng, models, min_tokens):
    """Where nothing but a stop token is left, it ends the text even before `min_tokens`."""
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=4) as deployment:
        one = request(rng, stop_token_ids=[STOP], min_tokens=min_tokens, grammar=f"1 2|3|{STOP}")
        deployment.run(one)
    assert deployment.tokens[one.id][1:] == [3, STOP]
    assert deployment.ended[one.id].stop_token == STOP


def test_a_refused_grammar_ends_its_sequence_only(tmp_path, rng, models):
    with Deployment(tmp_path, [FakeEngine(model) for model in models]) as deployment:
        wrong, right = request(rng, grammar=NO_GRAMMAR), request(rng)
        deployment.run(wrong, right)
        assert deployment.stats().running == 0
    ended = deployment.ended[wrong.id]
    assert (ended.reason, ended.code, ended.message) == (FinishReason.ERROR, "invalid_grammar", "no grammar")
    assert deployment.ended[right.id].reason is FinishReason.LENGTH
    assert not any(engine.sequences for engine in deployment.engines)
