"""Policies as data: which experts they name, which must run, whether they ask the gate."""

from __future__ import annotations

import msgspec
import pytest

from server.policy import (
    Contrastive,
    FusionRoute,
    Gate,
    Perplexity,
    Policy,
    Product,
    Proxy,
    Select,
    Single,
    Uniform,
    Weights,
    expert_names,
    needs_gate,
    participants,
)

EXPERTS = ["math", "text", "chat", "code"]
ALL = [0, 1, 2, 3]

# policy, the names it mentions, the experts that must run, whether it asks the gate
FACTS = [
    (Gate(), [], ALL, True),
    (Uniform(), [], ALL, False),
    (Uniform(space="prob"), [], ALL, False),
    (Weights({"chat": 1.0, "math": 2.0}), ["chat", "math"], [0, 2], False),
    (Weights({"code": 1.0, "math": 0.0}), ["code", "math"], [3], False),
    (Weights({"code": -1.0, "text": 2.0}), ["code", "text"], [1, 3], False),
    (Product(), [], ALL, False),
    (Select("gate"), [], ALL, True),
    (Select("entropy"), [], ALL, False),
    (Select("confidence"), [], ALL, False),
    (Single("text"), ["text"], [1], False),
    (Contrastive("code", "math"), ["code", "math"], [0, 3], False),
    (Proxy("chat", "math", "text"), ["chat", "math", "text"], [0, 1, 2], False),
    (Proxy("chat", "math", "chat"), ["chat", "math", "chat"], [0, 2], False),
    (FusionRoute("chat"), ["chat"], ALL, True),
    (Perplexity(), [], ALL, False),
]
POLICIES = [policy for policy, *_ in FACTS]


@pytest.mark.parametrize(("policy", "names", "running", "gated"), FACTS, ids=[str(policy) for policy in POLICIES])
def test_facts(policy, names, running, gated):
    assert expert_names(policy) == names
    assert participants(policy, EXPERTS) == running
    assert needs_gate(policy) is gated


def test_equal_policies_hash_alike_and_different_ones_are_kept_apart():
    copies = [msgspec.msgpack.decode(msgspec.msgpack.encode(policy), type=Policy) for policy in POLICIES]
    assert copies == POLICIES
    assert [hash(copy) for copy in copies] == [hash(policy) for policy in POLICIES]
    assert len(set(POLICIES + copies)) == len(POLICIES)


def test_weights_hash_ignores_the_order_of_names():
    assert hash(Weights({"a": 1.0, "b": 2.0})) == hash(Weights({"b": 2.0, "a": 1.0}))
    assert Weights({"a": 1.0, "b": 2.0}) != Weights({"a": 2.0, "b": 1.0})


@pytest.mark.parametrize("text", [b'{"rule":"uniform","spaec":"prob"}', b'{"rule":"average"}', b'{"space":"prob"}'])
def test_unknown_rules_and_parameters_are_refused(text):
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Policy)
