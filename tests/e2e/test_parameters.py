"""Every parameter of the HTTP surface over the real server: honoured, as can be seen in the answer, or refused by name.

One row, one test. The demo's gate fuses, so what is honoured is honoured over the fused distribution. `priority` and
`chat_template_kwargs` do nothing here that can be seen: test_limits.py has them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import demo
from tests.support.server_process import Served

LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 12}
FLAT: dict[str, Any] = {**LONG, "fusion": {"temperature": dict.fromkeys(demo.EXPERTS, 5.0)}}
"""The experts are hardly sure of anything, so that whatever acts on probabilities can be seen."""
HOT: dict[str, Any] = {**FLAT, "temperature": 2.0}
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Sum 94 and 77."}]
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {**CLOSED, "properties": {"first": {"type": "boolean"}}, "required": ["first"]},
    },
}
OTHER_TOOL: dict[str, Any] = {**TOOL, "function": {**TOOL["function"], "name": "reverse"}}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"first": true}'}}
SCHEMA: dict[str, Any] = {
    "name": "x",
    "schema": {**CLOSED, "properties": {"a": {"enum": [1]}}, "required": ["a"]},
}

Check = Callable[[Served], bool]


def text(server: Served, **body: Any) -> str:
    """The answer, of a chat."""
    return str(server.chat(**body)["choices"][0]["message"]["content"])


def texts(server: Served, **body: Any) -> list[str]:
    return [choice["message"]["content"] for choice in server.chat(**body)["choices"]]


def completed(server: Served, **body: Any) -> str:
    return str(server.complete(**{**LONG, **body})["choices"][0]["text"])


def message(server: Served, **body: Any) -> dict[str, Any]:
    return dict(server.chat(**body)["choices"][0]["message"])


def usage(server: Served, **body: Any) -> tuple[int, str]:
    """Tokens generated, and why there are no more."""
    answer = server.chat(**body)
    return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]


def prompt_of(server: Served, **body: Any) -> str:
    """What the experts read, as text."""
    ids = server.chat(**{"max_tokens": 1, **body, "return_token_ids": True})["prompt_token_ids"]
    return str(server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"])


def chunks(server: Served, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
    body = {"stream": True, "temperature": 0, **body}
    lines = server.http.post(path, json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def logprobs(server: Served, **body: Any) -> list[dict[str, Any]]:
    """The entries beside the tokens of a chat's answer."""
    return list(server.chat(logprobs=True, **body)["choices"][0]["logprobs"]["content"])


def calls(server: Served, **body: Any) -> list[str]:
    """Names of the tools called."""
    found = message(server, messages=QUESTION, tools=[TOOL, OTHER_TOOL], max_tokens=300, **body)["tool_calls"]
    assert all(set(json.loads(call["function"]["arguments"])) == {"first"} for call in found)
    return [call["function"]["name"] for call in found]


def streamed(server: Served) -> bool:
    """The last chunk of a choice carries its last text and its finish reason; the next is the usage."""
    options = {"include_usage": True}
    *pieces, last, closing = chunks(server, messages=QUESTION, stream_options=options, max_tokens=2)
    said = "".join(piece["choices"][0]["delta"].get("content", "") for piece in [*pieces, last])
    reasons = [piece["choices"][0]["finish_reason"] for piece in [*pieces, last]]
    return (
        said == "17"
        and reasons == [None] * len(pieces) + ["length"]
        and last["choices"][0]["delta"]["content"] == "7"
        and closing["choices"] == []
        and closing["usage"]["completion_tokens"] == 2
        and all("usage" not in piece for piece in pieces)
    )


def fused(server: Served) -> bool:
    """The alternatives are those of the gate's mixture: over all that is listed, no expert's own."""
    entries = logprobs(server, top_logprobs=20, **LONG)
    alone = logprobs(server, top_logprobs=20, model="polylogit-demo:math", **LONG)
    return (
        all(
            len(entry["top_logprobs"]) == 20
            and entry["logprob"] == entry["top_logprobs"][0]["logprob"]
            and 0.5 < sum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) < 1.0001
            for entry in entries
        )
        and entries[0]["top_logprobs"] != alone[0]["top_logprobs"]
    )


def scored(server: Served) -> bool:
    """The prompt's own log-probabilities agree with `echo`."""
    prompt = server.http.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
    own = server.chat(messages=QUESTION, prompt_logprobs=3, max_tokens=1)["prompt_logprobs"]
    echo = server.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    found = [entry[str(token)]["logprob"] for entry, token in zip(own[1:], prompt[1:], strict=True)]
    assert own[0] is None and all(3 <= len(entry) <= 4 for entry in own[1:])
    return found == pytest.approx(echo["token_logprobs"][1:], abs=1e-3)


def weighted(server: Served) -> bool:
    choice = server.chat(expert_weights=True, logprobs=True, **LONG)["choices"][0]
    weights = [entry["expert_weights"] for entry in choice["logprobs"]["content"]]
    means = {name: sum(one[name] for one in weights) / len(weights) for name in demo.EXPERTS}
    return choice["mean_expert_weights"] == pytest.approx(means, abs=1e-6)


def called(server: Served) -> bool:
    """The experts know no tools; of an answer in JSON or a call, they are pushed to begin the call."""
    body = {"response_format": {"type": "json_object"}, "logit_bias": {str(ord("<")): 100}, "max_tokens": 300}
    (call,) = message(server, tools=[TOOL], tool_choice="auto", parallel_tool_calls=False, **body)["tool_calls"]
    return call["function"]["name"] == "add" and set(json.loads(call["function"]["arguments"])) == {"first"}


def cached(server: Served) -> bool:
    """Nothing of a prompt that was never read, most of one that was."""
    long = [{"role": "user", "content": f"{time.time_ns()} " + "x" * 700}]
    first, second = (server.chat(messages=long, max_tokens=1)["usage"] for _ in range(2))
    counts = [used["prompt_tokens_details"]["cached_tokens"] for used in (first, second)]
    return counts[0] == 0 and 350 < counts[1] < second["prompt_tokens"]


def biased(server: Served, token: int) -> bool:
    return text(server, logit_bias={str(token): 100}, **LONG) == chr(token) * 12


CHAT: dict[str, Check] = {
    "messages: every role": lambda s: prompt_of(
        s,
        messages=[
            {"role": "developer", "content": "Be brief."},
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "85"},
        ],
    ).startswith(prompt_of(s, messages=[SYSTEM, *QUESTION]).partition("Sum")[0]),
    "messages: text parts are joined": lambda s: (
        "one\ntwo"
        in prompt_of(s, messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}])
    ),
    "model: the default": lambda s: s.chat(max_tokens=1)["model"] == "polylogit-demo",
    "model: one expert alone": lambda s: text(s, model="polylogit-demo:math") == "171",
    "model: another policy": lambda s: text(s, model="polylogit-demo:uniform", **LONG) != text(s, **LONG),
    "stream, stream_options.include_usage": streamed,
    "stream_options.continuous_usage_stats": lambda s: (
        [
            chunk["usage"]["completion_tokens"]
            for chunk in chunks(s, messages=QUESTION, stream_options=CONTINUOUS, max_tokens=2)
        ]
        == [0, 1, 2, 2]
    ),
    "n, with temperature 0": lambda s: texts(s, n=3) == ["171"] * 3,
    "n, sampled": lambda s: len(set(texts(s, n=4, seed=1, **HOT))) == 4,
    "max_tokens": lambda s: usage(s, max_tokens=2) == (2, "length"),
    "max_completion_tokens goes before max_tokens": lambda s: (
        usage(s, max_completion_tokens=1, max_tokens=2) == (1, "length")
    ),
    "max_tokens is clamped to the context": lambda s: (
        s.complete(prompt=[65] * (context(s) - 3), max_tokens=10**9, ignore_eos=True)["usage"]["completion_tokens"] == 3
    ),
    "temperature": lambda s: text(s, seed=1, **HOT) != text(s, **LONG) == text(s, seed=2, **LONG),
    "top_p": lambda s: text(s, top_p=1e-6, **HOT) == text(s, **FLAT) != text(s, **HOT),
    "top_k": lambda s: text(s, top_k=1, **HOT) == text(s, **FLAT) != text(s, **HOT),
    "min_p": lambda s: text(s, min_p=1, **HOT) == text(s, **FLAT) != text(s, **HOT),
    "seed": lambda s: text(s, seed=7, **HOT) == text(s, seed=7, **HOT) != text(s, seed=-(2**63), **HOT),
    "presence_penalty": lambda s: (
        text(s, seed=7, presence_penalty=2, **HOT) != text(s, seed=7, presence_penalty=-2, **HOT)
    ),
    "frequency_penalty": lambda s: text(s, frequency_penalty=2, **FLAT) != text(s, **FLAT),
    "repetition_penalty": lambda s: text(s, seed=7, repetition_penalty=10, **HOT) != text(s, seed=7, **HOT),
    "logit_bias": lambda s: biased(s, 90),
    "stop, a string": lambda s: text(s, stop="7") == "1",
    "stop, up to four": lambda s: text(s, stop=["x", "y", "71", "z"]) == "1",
    "stop_token_ids": lambda s: s.chat(stop_token_ids=[ord("7")])["choices"][0]["stop_reason"] == ord("7"),
    "include_stop_str_in_output": lambda s: text(s, stop="7", include_stop_str_in_output=True) == "17",
    "ignore_eos": lambda s: usage(s, **LONG) == (12, "length") and usage(s)[1] == "stop",
    "min_tokens": lambda s: usage(s, min_tokens=9, max_tokens=20)[0] >= 9 > usage(s)[0],
    "skip_special_tokens": lambda s: (
        "<|end|>" in text(s, skip_special_tokens=False, **LONG) and "<|end|>" not in text(s, **LONG)
    ),
    "logprobs": lambda s: [entry["token"] for entry in logprobs(s)][:3] == ["1", "7", "1"],
    "top_logprobs, fused": fused,
    "prompt_logprobs": scored,
    "response_format: text": lambda s: text(s, response_format={"type": "text"}) == "171",
    "response_format: json_object": lambda s: text(s, response_format={"type": "json_object"}, max_tokens=4)[0] == "{",
    "response_format: json_schema": lambda s: (
        json.loads(text(s, response_format={"type": "json_schema", "json_schema": SCHEMA})) == {"a": 1}
    ),
    "tools, tool_choice: auto": called,
    "tool_choice: none": lambda s: "tool_calls" not in message(s, tools=[TOOL], tool_choice="none", max_tokens=5),
    "tool_choice: required": lambda s: set(calls(s, tool_choice="required")) <= {"add", "reverse"},
    "tool_choice: named": lambda s: (
        calls(s, tool_choice={"type": "function", "function": {"name": "reverse"}}) == ["reverse"]
    ),
    "parallel_tool_calls": lambda s: len(calls(s, tool_choice="required", parallel_tool_calls=False)) == 1,
    "continue_final_message": lambda s: (
        text(s, messages=[*QUESTION, {"role": "assistant", "content": "17"}], continue_final_message=True) == "1"
    ),
    "add_generation_prompt": lambda s: (
        len(prompt_of(s, add_generation_prompt=False)) < len(prompt_of(s, add_generation_prompt=True))
    ),
    "return_token_ids": lambda s: s.chat(return_token_ids=True)["choices"][0]["token_ids"] == [*b"171", demo.EOS],
    "fusion: a policy": lambda s: (
        text(s, fusion={"policy": "uniform"}, **LONG) == text(s, model="polylogit-demo:uniform", **LONG)
    ),
    "fusion: coefficients": lambda s: text(s, fusion={"coefficients": {"math": 1}}) == "171",
    "fusion: temperature": lambda s: (
        logprobs(s, fusion={"policy": "uniform", "temperature": {"math": 5.0}}, **LONG)[0]["logprob"]
        != logprobs(s, fusion={"policy": "uniform"}, **LONG)[0]["logprob"]
    ),
    "expert_weights": weighted,
    "usage: cached tokens": cached,
    "ignored, as OpenAI does": lambda s: (
        text(s, user="me", metadata={"a": "b"}, store=True, service_tier="auto", whatever=[1]) == "171"
    ),
    "ids of answers": lambda s: (
        s.chat(max_tokens=1)["id"].startswith("chatcmpl-") and s.complete(max_tokens=1)["id"].startswith("cmpl-")
    ),
}

COMPLETIONS: dict[str, Check] = {
    "prompt: token ids": lambda s: completed(s, prompt=[*b"Sum 94"]) == completed(s),
    "prompt: lists": lambda s: (
        [choice["text"] for choice in s.complete(prompt=["Sum 94", "Sum 94"], **LONG)["choices"]] == [completed(s)] * 2
    ),
    "prompt: lists of token ids": lambda s: (
        s.complete(prompt=[[*b"Sum 94"], [65]], **LONG)["choices"][0]["text"] == completed(s)
    ),
    "max_tokens is 16": lambda s: s.complete(ignore_eos=True)["usage"]["completion_tokens"] == 16,
    "echo": lambda s: completed(s, echo=True) == "Sum 94" + completed(s),
    "echo with logprobs": lambda s: (
        s.complete(echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]["token_logprobs"][0] is None
    ),
    "logprobs": lambda s: (
        {len(top) for top in s.complete(logprobs=3, **LONG)["choices"][0]["logprobs"]["top_logprobs"]} == {3}
    ),
    "prompt_logprobs": lambda s: len(s.complete(prompt_logprobs=0)["choices"][0]["prompt_logprobs"]) == 6,
    "stream": lambda s: (
        "".join(piece["choices"][0]["text"] for piece in chunks(s, "/v1/completions", prompt="Sum 94", **LONG))
        == completed(s)
    ),
    "n": lambda s: len(s.complete(n=3, max_tokens=1)["choices"]) == 3,
}


def context(server: Served) -> int:
    return int(server.http.get("/v1/models").json()["data"][0]["max_model_len"])


@pytest.mark.parametrize("row", CHAT)
def test_chat(demo_server: Served, row: str) -> None:
    assert CHAT[row](demo_server)


@pytest.mark.parametrize("row", COMPLETIONS)
def test_completions(demo_server: Served, row: str) -> None:
    assert COMPLETIONS[row](demo_server)


PARTS = ({"type": "image_url", "image_url": {"url": "http://x"}}, {"type": "input_audio"}, {"type": "file"})
BIG = 10**9

REFUSED: list[tuple[str, Any]] = [
    ("messages", []),
    *(("messages", [{"role": "user", "content": [part]}]) for part in PARTS),
    ("messages", [{"role": "user", "content": "x" * 1100}]),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("stream_options", {"include_usage": True}),
    ("n", 17),
    ("max_tokens", 0),
    ("max_completion_tokens", -1),
    ("temperature", 2.1),
    ("top_p", 0),
    ("top_k", -2),
    ("min_p", 1.1),
    ("seed", 2**70),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("logit_bias", {str(demo.VOCABULARY): 1}),
    ("logit_bias", {"one": 1}),
    ("stop", ["a"] * 5),
    ("stop", ""),
    ("stop_token_ids", [demo.VOCABULARY]),
    ("ignore_eos", "yes"),
    ("min_tokens", -1),
    ("skip_special_tokens", 1),
    ("include_stop_str_in_output", 1),
    ("top_logprobs", 21),
    ("top_logprobs", 1),
    ("prompt_logprobs", 21),
    ("response_format", {"type": "json_schema"}),
    ("tools", []),
    ("tool_choice", "auto"),
    ("continue_final_message", True),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"tokenize": False}),
    ("chat_template_kwargs", {"tools": []}),
    ("return_token_ids", "yes"),
    ("priority", 2**64),
    ("fusion", {"policy": "nothing"}),
    ("fusion", {"coefficients": {"nobody": 1}}),
    ("fusion", {"temperature": {"math": 0}}),
    ("expert_weights", "yes"),
    ("suffix", "x"),
    ("echo", True),
    ("best_of", 2),
    ("reasoning_effort", "high"),
    ("structured_outputs", {"json": {}}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(demo_server: Served, name: str, value: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 4, name: value}
    response = demo_server.http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert error["param"].startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", []),
        ("prompt", [-1]),
        ("prompt", [2**63]),
        ("prompt", ["x"] * 2000),
        ("logprobs", 21),
        ("suffix", "x"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refused_completions(demo_server: Served, name: str, value: Any) -> None:
    response = demo_server.http.post("/v1/completions", json={"prompt": "x", name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_an_unknown_model(demo_server: Served) -> None:
    response = demo_server.http.post("/v1/chat/completions", json={"messages": QUESTION, "model": "gpt-4"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
