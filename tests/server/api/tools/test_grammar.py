"""What response_format and tools become: a grammar, seen where the coordinator gets it."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLTokenizer

from server.errors import BadRequest
from tests.support.api.deployment import END
from tests.support.api.fake_coordinator import Script, failure
from tests.support.api.in_process import Served
from tests.support.api.tools import ADD, NOW, TOOLS, USER, WRONG, accepts, deep, schema_format, submitted

HOSTILE: list[Any] = [
    deep(65),
    deep(500),
    {"type": "string", "pattern": "^(a+)+$"},
    {"type": "object", "patternProperties": {"^(a+)+$": {"type": "string"}}},
    {"anyOf": [{"type": "string", "pattern": "(?=a)b"}]},
    {"type": "string", "pattern": "(a)\\1"},
    {"type": "string", "pattern": "("},
    {"type": "array", "minItems": 10**9},
    {"type": "array", "maxItems": 1e18},
    {"type": "string", "minLength": 10**9},
    WRONG,
    {"not": {"type": "string"}},
    {"type": "array", "uniqueItems": True},
    {"$ref": "http://example.com/schema"},
    {"$ref": "#/$defs/missing"},
    {"type": "integer", "minimum": 5, "maximum": 2},
    {"enum": []},
    {"type": "string", "format": "foo"},
    {"enum": ["x" * 100] * 5000},
    {"patternProperties": 5},
    {"patternProperties": True},
    {"properties": 5},
    {"pattern": 5},
]


async def test_a_schema_becomes_a_grammar(api: Served, vocabulary: LLTokenizer) -> None:
    grammar = (await submitted(api, response_format=schema_format())).grammar
    assert accepts(vocabulary, grammar, '{"n": 5}') and accepts(vocabulary, grammar, '{"n":5}')
    for wrong in ('{"n": 10}', '{"n": 5.5}', '{"n": 5, "m": 1}', "{}", '{"n": 5} ', "five"):
        assert not accepts(vocabulary, grammar, wrong)


async def test_any_object(api: Served, vocabulary: LLTokenizer) -> None:
    grammar = (await submitted(api, response_format={"type": "json_object"})).grammar
    assert accepts(vocabulary, grammar, '{"a": [1, {"b": null}], "ü": "\\n"}')
    assert not accepts(vocabulary, grammar, "[1]")


async def test_every_choice_has_the_grammar(api: Served) -> None:
    await api.chat(response_format=schema_format(), n=3)
    assert len(api.fake.submitted) == 3 and len({each.grammar for each in api.fake.submitted}) == 1


async def test_text_completions_have_it_too(api: Served, vocabulary: LLTokenizer) -> None:
    assert (await api.complete(response_format=schema_format())).status_code == 200
    assert accepts(vocabulary, api.fake.submitted[0].grammar, '{"n": 5}')


async def test_text_has_no_grammar(api: Served) -> None:
    assert (await submitted(api, response_format={"type": "text"})).grammar is None


async def test_the_end_of_the_text_is_a_stop_token(api: Served) -> None:
    request = await submitted(api, response_format=schema_format(), stop_token_ids=[5])
    assert request.stop_token_ids == [5, END]


@pytest.mark.parametrize("schema", HOSTILE, ids=lambda schema: str(schema)[:40])
async def test_a_schema_that_cannot_be_run_is_refused(api: Served, schema: Any) -> None:
    for body in (
        {"response_format": schema_format(schema)},
        {"response_format": schema_format(schema), "stream": True},
    ):
        answer = await api.chat(**body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
        assert len(answer.content) < 2000
    assert api.fake.submitted == []


@pytest.mark.parametrize(
    "schema", [{"type": "object", "properties": {"patternProperties": True}}, {"enum": [{"patternProperties": 1}]}]
)
async def test_words_of_schemas_may_be_names_and_values(api: Served, schema: Any) -> None:
    await submitted(api, response_format=schema_format(schema))


async def test_64_levels_are_fine(api: Served) -> None:
    await submitted(api, response_format=schema_format(deep(64)))


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "n"}},
        {"type": "json_schema", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": True}},
        {"type": "json_object", "json_schema": {"name": "n", "schema": {}}},
        {"type": "xml"},
        {},
        "json_object",
    ],
)
async def test_an_incomplete_format_is_refused(api: Served, wanted: Any) -> None:
    answer = await api.chat(response_format=wanted)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("response_format")


async def test_nothing_may_follow_the_end(api: Served) -> None:
    assert (await api.chat(response_format=schema_format(), ignore_eos=True)).status_code == 400


async def test_an_engine_that_refuses_is_a_bad_request(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: [], ended=failure("invalid_grammar", "the grammar cannot be followed: x"))
    answer = await api.chat(response_format=schema_format())
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_grammar"


@pytest.mark.parametrize("parallel", [True, False])
async def test_required_calls(api: Served, vocabulary: LLTokenizer, parallel: bool) -> None:
    body = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
    grammar = (await submitted(api, **body)).grammar
    assert accepts(vocabulary, grammar, ADD) and accepts(vocabulary, grammar, NOW)
    assert accepts(vocabulary, grammar, f"{ADD}\n{NOW}") is parallel
    for wrong in ("", "text", ADD.replace("5", "50"), ADD.replace("add", "sub"), NOW.replace("{}", '{"n": 1}')):
        assert not accepts(vocabulary, grammar, wrong)


async def test_a_named_call(api: Served, vocabulary: LLTokenizer) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    grammar = (await submitted(api, tools=TOOLS, tool_choice=choice)).grammar
    assert accepts(vocabulary, grammar, NOW)
    assert not accepts(vocabulary, grammar, ADD) and not accepts(vocabulary, grammar, f"{NOW}\n{NOW}")


async def test_a_call_or_an_answer_in_json(hermes: Served, vocabulary: LLTokenizer) -> None:
    grammar = (await submitted(hermes, tools=TOOLS, response_format=schema_format())).grammar
    assert accepts(vocabulary, grammar, ADD) and accepts(vocabulary, grammar, '{"n": 5}')
    assert not accepts(vocabulary, grammar, "text")


@pytest.mark.parametrize("parallel", [True, False])
async def test_left_to_the_model_what_it_begins_as_a_call_is_one(
    hermes: Served, vocabulary: LLTokenizer, parallel: bool
) -> None:
    grammar = (await submitted(hermes, tools=TOOLS, tool_choice="auto", parallel_tool_calls=parallel)).grammar
    for text in ("", "Grüße,\n<tool>", "a <tool_", ADD, f"First: {NOW}", NOW):
        assert accepts(vocabulary, grammar, text), text
    for text in ("<tool_call>", "a <tool_call>b", ADD.replace("5", "10"), ADD.replace("add", "sub"), ADD[:-1]):
        assert not accepts(vocabulary, grammar, text), text
    assert accepts(vocabulary, grammar, f"{ADD}\n{NOW} and so on") is parallel


async def test_left_to_the_model_a_schema_that_cannot_be_followed_is_any_object(
    hermes: Served, vocabulary: LLTokenizer
) -> None:
    tool = {"name": "add", "parameters": {"type": "object", "not": {"required": ["n"]}}}
    grammar = (await submitted(hermes, tools=[{"type": "function", "function": tool}])).grammar
    assert accepts(vocabulary, grammar, ADD) and not accepts(vocabulary, grammar, ADD.replace("5", ""))
    strict = {"type": "function", "function": {**tool, "strict": True}}
    assert (await hermes.chat(tools=[strict])).json()["error"]["param"] == "tools"


async def test_without_a_choice_there_is_no_grammar(hermes: Served) -> None:
    for choice in ({"tool_choice": "none"}, {"ignore_eos": True}):
        hermes.fake.reset()
        assert (await submitted(hermes, tools=TOOLS, **choice)).grammar is None


@pytest.mark.parametrize("levels", [128, 129, 300, 450, 900])
async def test_how_deep_parameters_may_be(hermes: Served, levels: int) -> None:
    body = {"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "parameters": deep(levels)}}]}
    for path, more in (("/tokenize", {}), ("/v1/chat/completions", {"tool_choice": "none"})):
        error = (await hermes.http.post(path, json={**body, **more})).json().get("error", {"param": None})
        if levels > 128:
            assert error["param"] == "tools[0].function.parameters"
        else:
            assert error.get("code") == (None if path == "/tokenize" else "context_length_exceeded")


def test_an_error_is_short() -> None:
    from server.api.tools.grammar import json_grammar

    with pytest.raises(BadRequest) as caught:
        json_grammar({"type": "string", "pattern": "[" * 1000})
    assert len(caught.value.message) < 1000
