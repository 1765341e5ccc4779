"""Every parameter is honoured or refused by name; nothing is accepted and forgotten."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from server.api.http.body import parse
from server.api.protocol import ChatRequest
from server.errors import BadRequest
from server.policy import Product, Single, Uniform, Weights
from server.request import SamplingParams
from tests.support.api.deployment import CONTEXT, VOCABULARY, deployment
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served, served

HOSTILE = 10**9

REFUSED: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", "hi"),
    ("messages", {}),
    ("messages", [1]),
    ("messages", [[]]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": 5}]),
    ("messages", [{"role": 5, "content": "x"}]),
    ("messages", [{"role": "wizard", "content": "x"}]),
    ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "file"}]}]),
    ("messages", [{"role": "user", "content": ["x"]}]),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
    ("messages", [{"role": "user", "content": "x"}] * 5000),
    ("messages", [{"role": "user", "content": "x" * 20_000}]),
    ("n", 0),
    ("n", 17),
    ("n", HOSTILE),
    ("n", 1.5),
    ("n", "1"),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_completion_tokens", 0),
    ("min_tokens", -1),
    ("seed", 2**70),
    ("seed", 1.5),
    ("priority", 2**64),
    ("priority", 2**20 + 1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 5),
    ("stop", ["a"] * 200_000),
    ("stop", [1]),
    ("stop", 5),
    ("stop", "x" * 2000),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [VOCABULARY]),
    ("stop_token_ids", list(range(200))),
    ("stop_token_ids", ["x"] * 300_000),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(VOCABULARY): 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "x"}),
    ("logit_bias", {str(key): 1 for key in range(300_000)}),
    ("logit_bias", [1]),
    ("logprobs", 3),
    ("top_logprobs", 21),
    ("top_logprobs", HOSTILE),
    ("top_logprobs", 2),  # without logprobs
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),  # without stream
    ("tools", []),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "auto"),
    ("response_format", {"type": "json_schema"}),
    ("chat_template", "{{ 1 }}"),
    ("chat_template_kwargs", {"tokenize": True}),
    ("chat_template_kwargs", {"enable_thinking": [1]}),
    ("echo", True),
    ("functions", [{"name": "f"}]),
    ("modalities", ["audio"]),
    ("audio", {"voice": "x"}),
    ("reasoning_effort", "high"),
    ("use_beam_search", True),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", HOSTILE),
    ("prompt_logprobs", 1),  # the experts' prompts differ
    ("best_of", 2),
    ("structured_outputs", {"json": {}}),
    ("guided_regex", "(a+)+b"),
    ("truncate_prompt_tokens", 5),
    ("bad_words", ["x"]),
    ("allowed_token_ids", [1]),
    ("fusion", "uniform"),
    ("fusion", {"policy": "nothing"}),
    ("fusion", {"unknown": 1}),
    ("fusion", {str(key): 1 for key in range(150_000)}),
    ("fusion", {"coefficients": {}}),
    ("fusion", {"coefficients": {"nobody": 1}}),
    ("fusion", {"coefficients": {"math": 0}}),
    ("fusion", {"coefficients": {"math": "x"}}),
    ("fusion", {"coefficients": {"math": -1}, "space": "prob"}),
    ("fusion", {"coefficients": {"math": 1}, "policy": "uniform"}),
    ("fusion", {"space": "prob"}),
    ("fusion", {"temperature": {"nobody": 1}}),
    ("fusion", {"temperature": {"math": 0}}),
    ("fusion", {"coefficients": {str(key): 1 for key in range(300_000)}}),
    ("expert_weights", "yes"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: str(value)[:40])
async def test_refused_quickly_and_by_name(api: Served, name: str, value: Any) -> None:
    answer = await api.chat(**{name: value})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or error["message"]).startswith((name, "the body has more than")), error
    assert len(answer.content) < 20_000
    assert api.fake.submitted == []


async def test_sampling_reaches_the_coordinator(api: Served) -> None:
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"65": -100, "66": 2.5},
    }
    assert (await api.chat(**body, max_tokens=9, min_tokens=2, priority=-4)).status_code == 200
    sequence = api.fake.submitted[0]
    assert sequence.sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias={65: -100.0, 66: 2.5},
    )
    assert (sequence.max_tokens, sequence.min_tokens, sequence.priority) == (9, 2, -4)


async def test_defaults(api: Served) -> None:
    await api.chat(top_k=-1, seed=0)
    sequence = api.fake.submitted[0]
    assert sequence.sampling == SamplingParams()
    assert sequence.top_logprobs is None and not sequence.expert_weights and sequence.temperatures is None
    assert sequence.max_tokens == CONTEXT - max(map(len, sequence.prompts))


async def test_nulls_and_ignored_keys(api: Served) -> None:
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "whatever": [1]}
    nulls = dict.fromkeys(["stop", "tools", "n", "logit_bias", "response_format", "seed", "max_tokens", "stream"])
    neutral = {"echo": False, "tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1}
    assert (await api.chat(**nulls, **ignored)).status_code == 200
    assert (await api.chat(**neutral)).status_code == 200
    nested = {"stream_options": {"include_usage": None}, "fusion": {"policy": None, "coefficients": {"math": 1}}}
    answer = await api.chat(stream=True, **nested)
    assert answer.status_code == 200 and '"usage"' not in answer.text


async def test_max_tokens_is_clamped_to_the_context(api: Served) -> None:
    await api.chat(max_tokens=10**12)
    await api.chat(max_completion_tokens=5, max_tokens=9)
    assert [sequence.max_tokens for sequence in api.fake.submitted] == [CONTEXT - 17, 5]
    await api.complete(prompt=[1] * (CONTEXT - 3), max_tokens=100)
    assert api.fake.submitted[-1].max_tokens == 3


async def test_a_prompt_that_fills_the_context_of_one_expert(api: Served) -> None:
    """The expert `text` has a longer prompt: its own system message comes first."""
    message = {"role": "user", "content": "x" * (CONTEXT - 5)}
    assert (await api.chat(model="duo:math", messages=[message])).status_code == 200
    fault = (await api.chat(messages=[message], stream=True)).json()["error"]
    assert (fault["param"], fault["code"]) == ("messages", "context_length_exceeded")


async def test_more_choices_than_can_ever_run(tmp_path: Path) -> None:
    async with served(deployment(tmp_path, limits={"sequences": 4, "queue": 4})) as server:
        await server.wait_ready()
        for answer in (
            await server.chat(n=9),
            await server.complete(n=9),
            await server.complete(n=8, prompt_logprobs=0),
        ):
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert (await server.complete(prompt=["a"] * 5, n=2)).json()["error"]["param"] == "prompt"
        assert (await server.chat(n=8)).status_code == 200


async def test_models(api: Served) -> None:
    await api.chat()
    await api.chat(model="duo:product")
    await api.chat(model="duo:math")
    assert [sequence.policy for sequence in api.fake.submitted] == [Uniform(), Product(), Single("math")]
    fault = await api.chat(model="gpt-4")
    assert fault.status_code == 404
    assert fault.json()["error"]["param"] == "model"


async def test_fusion_of_one_request(api: Served) -> None:
    await api.chat(fusion={"policy": "product"})
    await api.chat(fusion={"coefficients": {"math": 1.5, "text": -0.5}})
    await api.chat(fusion={"coefficients": {"math": 1}, "space": "prob", "temperature": {"text": 0.5}})
    first, second, third = api.fake.submitted
    assert first.policy == Product()
    assert second.policy == Weights({"math": 1.5, "text": -0.5})
    assert third.policy == Weights({"math": 1.0}, space="prob")
    assert third.prompts[1] == [] and third.temperatures == [1.0, 0.5]


async def test_stop_strings_are_not_read_before_min_tokens(api: Served) -> None:
    api.fake.script = Script(tokens=lambda _: list(b"a.b.c.d"))
    choice = (await api.chat(stop=".", min_tokens=3)).json()["choices"][0]
    assert choice["message"]["content"] == "a.b"


async def test_long_faults_are_short(api: Served) -> None:
    error = (await api.chat(temperature="x" * 100_000)).json()["error"]
    assert len(error["message"]) < 400
    error = (await api.chat(model="x" * 200)).json()["error"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize("name", ["logit_bias", "fusion", "stop"])
def test_faults_of_large_objects_are_told_quickly(name: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "x"}],
        name: {str(key * 7919 % 190_027): 1 for key in range(190_000)},
    }
    started = time.thread_time()
    with pytest.raises(BadRequest):
        parse(ChatRequest, body)
    assert time.thread_time() - started < 0.03
