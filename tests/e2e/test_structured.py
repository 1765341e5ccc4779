"""Answers under a grammar, from engines that cannot keep step: prompts of another length for every expert, read 64
tokens a tick. What finishes with `stop` must parse and validate; `length` may cut an answer anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.api.tools.grammar import json_grammar
from server.launch.local import LocalDeployment
from server.policy import Gate, Policy, Product, Single, Uniform
from server.request import FinishReason
from tests.support import demo, traffic
from tests.support.sequences import again, sampled
from tests.support.server_process import Served, serve

ORDER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 60},
        "exact": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "size", "exact", "words"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"first": {"type": "integer", "maximum": 99, "minimum": 0}, "exact": {"type": "boolean"}},
                "required": ["first", "exact"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "reverse")
]
ASKED: list[Any] = [{"role": "user", "content": "Add 27 and 58, then reverse stone."}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A list of 8 is shorter than what most places of a grammar allow, and longer than what others do."""
    data = demo.configuration(
        list_length=8,
        tool_parser="hermes",
        expert={"max_num_batched_tokens": 64},
        only={"text": {"system_prompt": "Answer briefly. " * 12}, "chat": {"system_prompt": "Be kind."}},
    )
    with serve(data) as server:
        yield server


def is_order(value: Any) -> bool:
    return (
        set(value) == {"colour", "size", "exact", "words"}
        and value["colour"] in ("red", "green", "blue")
        and type(value["size"]) is int
        and 1 <= value["size"] <= 60
        and type(value["exact"]) is bool
        and 1 <= len(value["words"]) <= 3
        and all(isinstance(word, str) and len(word) <= 6 for word in value["words"])
    )


def order_format() -> Any:
    return {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER, "strict": True}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("model", ["demo", "demo:text"])
def test_a_schema_holds_for_every_choice(served: Served, model: str, temperature: float) -> None:
    answer = served.openai.chat.completions.create(
        model=model,
        messages=ASKED,
        response_format=order_format(),
        n=3,
        temperature=temperature,
        seed=5,
        max_tokens=400,
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert choice.finish_reason == "stop", choice.message.content
        assert is_order(json.loads(choice.message.content or "")), choice.message.content


def test_any_object(served: Served) -> None:
    answer = served.openai.chat.completions.create(
        model="demo", messages=ASKED, response_format={"type": "json_object"}, n=4, seed=1, max_tokens=500
    )
    for choice in answer.choices:
        text = choice.message.content or ""
        assert text.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
    assert any(choice.finish_reason == "stop" for choice in answer.choices)


def test_a_schema_for_text_completions(served: Served) -> None:
    body = {"prompt": ["One ", "A rather longer beginning "], "response_format": order_format(), "max_tokens": 400}
    choices = served.http.post("/v1/completions", json=body).json()["choices"]
    assert all(is_order(json.loads(choice["text"])) for choice in choices if choice["finish_reason"] == "stop")
    assert {choice["finish_reason"] for choice in choices} == {"stop"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "reverse"}}])
def test_a_forced_call(served: Served, choice: Any) -> None:
    answer = served.openai.chat.completions.create(
        model="demo",
        messages=ASKED,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=400,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name in (("add", "reverse") if choice == "required" else ("reverse",))
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"first", "exact"} and 0 <= arguments["first"] <= 99
    assert answer.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_a_forced_call_as_a_stream(served: Served) -> None:
    stream = served.openai.chat.completions.create(
        model="demo", messages=ASKED, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=True
    )
    pieces, reasons = [], []
    for chunk in stream:
        pieces += chunk.choices[0].delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert pieces[0].id and pieces[0].function and pieces[0].function.name in ("add", "reverse")
    assert all(piece.id is None and piece.index == 0 for piece in pieces[1:])
    arguments = json.loads("".join(piece.function.arguments or "" for piece in pieces if piece.function))
    assert set(arguments) == {"first", "exact"}
    assert reasons[-1] == "tool_calls"


def test_a_turn_after_a_call(served: Served) -> None:
    """The demo's experts know no tools: that the conversation reaches them is all that can be asked."""
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"first": 1, "exact": true}'}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "call_1", "content": "85"}]
    answer = served.openai.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_hostile_schemas_are_refused_and_the_engines_live(served: Served) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(65):
        deep = {"type": "array", "items": deep}
    patterns = ["^(a+)+$", "^(a{1,1000}){1,1000}$", "^(?=a)b", "(a)\\1"]
    schemas = [deep, {"type": "array", "minItems": 10**9}, {"type": "nothing"}, {"not": {}}]
    schemas += [{"type": "string", "pattern": pattern} for pattern in patterns]
    for schema in schemas:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": ASKED, "response_format": wanted, "stream": True}
        response = served.http.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format"), schema
    test_a_schema_for_text_completions(served)


def test_sequences_that_were_parked_and_preempted_keep_to_the_grammar(cramped: LocalDeployment) -> None:
    """Twenty at once in engines with room for a few; every one is what it would have been alone."""
    policies: list[Policy] = [Uniform(), Gate(), Product(), Uniform(space="prob"), Single("text")]
    grammar = json_grammar(ORDER)
    requests = [
        sampled(
            [[257, *b"x" * (10 + 37 * (number + expert) % 90), 258, 261] for expert in range(3)],
            policies[number % len(policies)],
            160,
            seed=number,
            stop_token_ids=[demo.EOS],
            grammar=grammar,
        )
        for number in range(20)
    ]
    before = cramped.stats()
    results = cramped.generate(requests, timeout=60)
    after = traffic.settled(cramped)
    assert after.readded > before.readded
    assert sum(expert.masked_rows for expert in after.experts) == sum(expert.masked_rows for expert in before.experts)
    stopped = 0
    for request in requests:
        ended = results[request.id].ended
        assert ended is not None and ended.reason in (FinishReason.STOP, FinishReason.LENGTH), ended
        text = bytes(token for token in results[request.id].tokens if token < 256).decode(errors="replace")
        if ended.reason is FinishReason.STOP:
            assert is_order(json.loads(text)), text
            stopped += 1
    assert stopped > len(requests) // 2


def test_a_grammar_that_an_engine_refuses_ends_its_sequence_only(cramped: LocalDeployment) -> None:
    prompts = [[257, 97, 258, 261]] * 3
    wrong = sampled(prompts, Uniform(), 8, seed=1, grammar="start: (")
    right = again(wrong, grammar=None)
    results = cramped.generate([wrong, right], timeout=30)
    ended = results[wrong.id].ended
    assert ended is not None and (ended.reason, ended.code) == (FinishReason.ERROR, "invalid_grammar")
    assert "grammar" in ended.message and not results[wrong.id].tokens
    assert len(results[right.id].tokens) == 8
