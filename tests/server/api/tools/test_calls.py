"""Tool calls in a text, however the text is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest

from server.api.tools.calls import CallStream, MessageDelta

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": {"c": "}<\\\\\\"{"}}}\n</tool_call>'
Calls = list[tuple[str, str]]


def read(text: str, cuts: list[int], max_calls: int | None = None) -> tuple[str, Calls, CallStream]:
    """Content and calls of `text`, pushed in pieces that end at `cuts`."""
    stream = CallStream(max_calls)
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, names, arguments = "", {}, {}
    for gained in [*(stream.push(piece) for piece in pieces), stream.flush()]:
        assert isinstance(gained, MessageDelta)
        content += gained.content
        for piece in gained.calls:
            if piece.name is not None:
                assert piece.index not in names and piece.identity.startswith("call_")
                names[piece.index], arguments[piece.index] = piece.name, ""
            arguments[piece.index] += piece.arguments
    return content, [(names[index], arguments[index]) for index in sorted(names)], stream


def add_arguments() -> str:
    return ADD.split('"arguments": ')[1].removesuffix("}\n</tool_call>")


CASES: list[tuple[str, str, Calls]] = [
    ("nothing but text", "nothing but text", []),
    ("a < b <tool", "a < b <tool", []),
    (ADD, "", [("add", add_arguments())]),
    (f"Let me see.\n{ADD}\n{ADD}\n", "Let me see.\n", [("add", add_arguments())] * 2),
    (f"{ADD} and more", "and more", [("add", add_arguments())]),
    ('<tool_call>{"arguments": {"x": [1]}, "name": "f"}</tool_call>', "", [("f", '{"x":[1]}')]),
    ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("<tool_call>no JSON</tool_call>!", "<tool_call>no JSON</tool_call>!", []),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ('<tool_call>{"name": "f", "arguments": {"a": ', "", [("f", '{"a": ')]),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}', "", [("f", '{"a": 1}')]),
    (f"<tool_call>{'x' * 3000}</tool_call>", f"<tool_call>{'x' * 3000}</tool_call>", []),
]


@pytest.mark.parametrize(("text", "content", "calls"), CASES, ids=lambda value: str(value)[:30])
def test_the_same_however_it_is_cut(text: str, content: str, calls: Calls) -> None:
    chance = random.Random(3)
    cuttings = [[], list(range(1, len(text)))]
    cuttings += [sorted(chance.sample(range(len(text) + 1), min(5, len(text)))) for _ in range(40)]
    for cuts in cuttings:
        assert read(text, cuts)[:2] == (content, calls)


def test_arguments_come_as_they_grow() -> None:
    stream = CallStream()
    assert stream.push('<tool_call>{"name": "f", "arg').calls == []
    (first,) = stream.push('uments": {"a"').calls
    assert first.shown()["function"] == {"name": "f", "arguments": '{"a"'} and first.shown()["type"] == "function"
    (second,) = stream.push(": 1}").calls
    assert second.shown() == {"index": 0, "function": {"arguments": ": 1}"}}


def test_calls_after_the_limit_are_left_out() -> None:
    content, calls, stream = read(f"{ADD}\n{ADD}", [20], max_calls=1)
    assert content == "" and stream.count == 2
    assert [json.loads(arguments) for _, arguments in calls] == [json.loads(add_arguments())]
