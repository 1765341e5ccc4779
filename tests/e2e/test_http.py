"""`polylogit serve` over a real port, with real engines, driven by the `openai` SDK."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from playwright.sync_api import expect, sync_playwright

from server import __version__
from tests.support import demo, gates
from tests.support.browser import CHROMIUM, FLAGS, needs_chromium
from tests.support.oracle import fusion, rules
from tests.support.oracle.huggingface import Reference
from tests.support.server_process import Served, serve, until

QUESTION = [{"role": "user", "content": "Sum 94 and 77."}]
LONG = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    gate = gates.build(
        tmp_path_factory.mktemp("gate") / "gate.pt",
        experts=demo.EXPERTS,
        tokenizer=demo.model("math") / "tokenizer.json",
        top_k=32,
    )
    policies = {
        "uniform": {},
        "mixture": {"rule": "uniform", "space": "prob"},
        "gate": {},
        "confidence": {"rule": "select", "by": "confidence"},
    }
    with serve(demo.configuration(list_length=32, gate={"file": str(gate)}, policies=policies)) as server:
        yield server


def ask(server: Served, **parameters: Any) -> Any:
    """A greedy chat completion, unless `parameters` say otherwise."""
    return server.openai.chat.completions.create(
        **{"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 24, **parameters}
    )


def text_of(server: Served, **parameters: Any) -> str:
    return ask(server, **parameters).choices[0].message.content


# --- answers ---


def test_an_expert_alone_answers_as_transformers_does(server: Served, reference: Reference) -> None:
    prompt = reference.encode(QUESTION)
    tokens = reference.decode([[prompt] * 3], rules.log_linear([1.0, 0.0, 0.0]), 24).tokens[0].tolist()
    expected = tokens[: tokens.index(demo.EOS)]
    answer = ask(server, model="demo:math")
    assert answer.choices[0].message.content == reference.tokenizer.decode(expected)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "demo:math"
    assert answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(expected) + 1)  # and the end token
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_brings_the_same_answer(server: Served) -> None:
    whole = ask(server, extra_body=LONG)
    chunks = list(ask(server, extra_body=LONG, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_concurrent_async_streams_bring_what_each_brings_alone(server: Served) -> None:
    prompts = demo.conversations(10)
    alone = [text_of(server, messages=messages, extra_body=LONG) for messages in prompts]

    async def stream(client: openai.AsyncOpenAI, messages: Any) -> str:
        parts = await client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=24, stream=True, extra_body=LONG
        )
        return "".join([part.choices[0].delta.content or "" async for part in parts])

    async with server.async_openai() as client:
        together = await asyncio.gather(*(stream(client, messages) for messages in prompts))
        single = await client.chat.completions.create(
            model="demo", messages=prompts[0], temperature=0, max_tokens=24, extra_body=LONG
        )
    assert together == alone
    assert single.choices[0].message.content == alone[0]


def test_completions_from_text_ids_and_lists(server: Served, reference: Reference) -> None:
    text = "Sum 94 and 77."
    ids = reference.tokenizer.encode(text)

    def complete(prompt: Any, **parameters: Any) -> Any:
        return server.openai.completions.create(
            model="demo", prompt=prompt, temperature=0, max_tokens=12, extra_body=LONG, **parameters
        )

    answer = complete(text)
    assert answer.id.startswith("cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert complete(ids).choices[0].text == answer.choices[0].text
    several = complete([text, "Reverse abc."])
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == answer.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in complete(text, stream=True)) == answer.choices[0].text


# --- parameters ---


def test_n_choices_differ_and_a_seed_repeats_them(server: Served) -> None:
    first, second = (ask(server, temperature=1.5, n=4, seed=11, extra_body=LONG) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage.completion_tokens == 4 * 24
    other = ask(server, temperature=1.5, n=4, seed=12, extra_body=LONG)
    assert texts != [choice.message.content for choice in other.choices]


def test_n_choices_in_a_stream(server: Served) -> None:
    whole = ask(server, temperature=1.5, n=3, seed=5, extra_body=LONG)
    texts, reasons = ["", "", ""], [[], [], []]
    for chunk in ask(server, temperature=1.5, n=3, seed=5, extra_body=LONG, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [["length"]] * 3


def test_a_stop_string_ends_the_answer_before_it(server: Served) -> None:
    full = text_of(server, extra_body=LONG)
    stop = full[6:9]
    for answer in (ask(server, stop=stop, extra_body=LONG), ask(server, stop=["\x00never", stop], extra_body=LONG)):
        assert answer.choices[0].message.content == full[: full.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 24
    chunks = list(ask(server, stop=stop, extra_body=LONG, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == full[: full.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_fused_distribution(server: Served) -> None:
    answer = ask(server, logprobs=True, top_logprobs=20, extra_body=LONG)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 24
    shown = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert shown.replace("<|end|>", "") == answer.choices[0].message.content
    for entry in entries:
        listed = [top.logprob for top in entry.top_logprobs]
        assert len(listed) == 20
        assert listed == sorted(listed, reverse=True)
        assert entry.logprob == listed[0]  # greedy
        assert entry.token == entry.top_logprobs[0].token
        assert 0.5 < sum(map(math.exp, listed)) < 1 + 1e-5
    completion = server.openai.completions.create(
        model="demo", prompt="Sum 94", temperature=0, max_tokens=6, logprobs=3, extra_body=LONG
    )
    assert len(completion.choices[0].logprobs.token_logprobs) == 6
    assert all(len(top) == 3 for top in completion.choices[0].logprobs.top_logprobs)


def test_logprobs_are_those_of_fusion_over_the_whole_vocabulary(server: Served, reference: Reference) -> None:
    """Lists of 32, against the oracle's arithmetic on transformers' distributions. The experts are heated, so that the
    lists leave something out."""
    prompt, heat = reference.encode(QUESTION), 2.5
    body = {"return_token_ids": True, "fusion": {"temperature": dict.fromkeys(demo.EXPERTS, heat)}, **LONG}
    for model, space in (("demo", "logprob"), ("demo:mixture", "prob")):
        choice = ask(server, model=model, logprobs=True, top_logprobs=20, extra_body=body).choices[0]
        after = reference.logprobs(prompt + choice.token_ids)[:, len(prompt) - 1 : -1].transpose(0, 1)  # [T, E, V]
        after = (after / heat).log_softmax(-1)
        found = torch.tensor([[top.logprob for top in entry.top_logprobs] for entry in choice.logprobs.content]).exp()
        expected = fusion.combine(after, [1 / 3] * 3, space).softmax(-1).topk(20).values
        assert float((found - expected).abs().max()) < 1e-4


def test_policies_and_coefficients_in_the_extra_body(server: Served) -> None:
    def fused(**fusion: Any) -> str:
        return text_of(server, extra_body={"fusion": fusion, **LONG})

    for policy in ("uniform", "mixture", "gate", "confidence"):
        assert fused(policy=policy) == text_of(server, model=f"demo:{policy}", extra_body=LONG)
    assert fused(coefficients={"text": 1.0}) == text_of(server, model="demo:text", extra_body=LONG)
    assert len({text_of(server, model=f"demo:{name}", extra_body=LONG) for name in demo.EXPERTS}) == 3
    with pytest.raises(openai.BadRequestError, match=r"fusion\.policy"):
        fused(policy="unknown")


def test_expert_weights(server: Served) -> None:
    body = {"expert_weights": True, **LONG}
    choice = ask(server, model="demo:gate", extra_body=body).choices[0]
    weights = choice.expert_weights
    assert len(weights) == 24
    assert all(list(one) == demo.EXPERTS and abs(sum(one.values()) - 1) < 1e-5 for one in weights)
    assert len({round(one["math"], 4) for one in weights}) > 5
    for name in demo.EXPERTS:
        mean = sum(one[name] for one in weights) / len(weights)
        assert choice.mean_expert_weights[name] == pytest.approx(mean, abs=1e-6)
    streamed = [c.choices[0] for c in ask(server, model="demo:gate", extra_body=body, stream=True) if c.choices]
    seen = [one for piece in streamed for one in getattr(piece, "expert_weights", None) or []]
    assert [one["math"] for one in seen] == pytest.approx([one["math"] for one in weights], abs=1e-4)
    assert streamed[-1].mean_expert_weights == pytest.approx(choice.mean_expert_weights, abs=1e-4)
    beside = ask(server, model="demo:gate", extra_body=body, logprobs=True).choices[0].logprobs.content
    assert [entry.expert_weights["math"] for entry in beside] == pytest.approx(
        [one["math"] for one in weights], abs=1e-4
    )


async def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(server: Served) -> None:
    async with server.async_openai() as client:

        async def text_of(seed: int, content: str) -> str:
            answer = await client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": content}],
                seed=seed,
                temperature=1,
                max_tokens=24,
                extra_body=LONG,
            )
            return answer.choices[0].message.content

        alone = await text_of(77, "Add 53 and 36.")
        crowd = [text_of(seed, "x" * seed) for seed in range(1, 16)]
        together = await asyncio.gather(text_of(77, "Add 53 and 36."), *crowd)
    assert together[0] == alone
    assert len(set(together)) > 8


# --- the playground ---


@needs_chromium
def test_playground(server: Served) -> None:
    """In a real browser over real engines: every answer is its own model's, tokens are of the expert alone."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(server.url)
        page.select_option("#beside", "*")
        page.fill("#prompt", QUESTION[0]["content"])
        page.press("#prompt", "Enter")
        expect(page.locator(".turn")).to_have_attribute("data-done", "", timeout=60_000)
        texts = [
            "".join(answer.locator(".token:not(.unsaid)").all_inner_texts()) for answer in page.locator(".answer").all()
        ]
        models = ["demo", *(f"demo:{name}" for name in demo.EXPERTS)]
        assert texts == [text_of(server, model=model, max_tokens=256) for model in models]
        for index in range(3):
            last = page.locator(".answer").nth(index + 1).locator(".token").last
            assert f"colour-{index} " in f"{last.get_attribute('class')} "
        browser.close()


# --- what stands around the answers ---


def test_models(server: Served) -> None:
    names = [model.id for model in server.openai.models.list().data]
    assert names[0] == "demo"
    assert set(names[1:]) == {f"demo:{name}" for name in ("uniform", "mixture", "gate", "confidence", *demo.EXPERTS)}
    assert server.openai.models.retrieve("demo:text").id == "demo:text"
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.models.retrieve("demo:nobody")
    assert caught.value.body["code"] == "model_not_found"


def test_refusals_are_openai_errors(server: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(server, model="nobody")
    assert missing.value.body["param"] == "model"
    for parameters, param in [({"temperature": 3}, "temperature"), ({"n": 17}, "n"), ({"top_p": 0}, "top_p")]:
        with pytest.raises(openai.BadRequestError) as refused:
            ask(server, **parameters)
        assert (refused.value.body["param"], refused.value.body["type"]) == (param, "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        ask(server, messages=[{"role": "user", "content": "x" * 1100}])
    assert long.value.body["code"] == "context_length_exceeded"


def test_what_the_server_says_of_itself(server: Served) -> None:
    assert server.http.get("/version").json() == {"version": __version__}
    paths = server.http.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            assert {"200", "400", "413"} <= set(operation["responses"]), path
    page = server.http.get("/docs")
    assert page.status_code == 200 and "/openapi.json" in page.text


def test_errors_of_routes_are_objects(server: Served) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health/live", 405),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]


def test_no_cross_origin_requests_unless_configured(server: Served) -> None:
    headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
    for answer in (server.http.get("/version", headers=headers), server.http.options("/v1/models", headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_tokens_and_back(server: Served) -> None:
    body = {"prompt": "Sum é<|end|>", "return_token_strs": True}
    answer = server.http.post("/tokenize", json=body).json()
    assert answer["tokens"] == [*"Sum é".encode(), demo.EOS]
    assert (answer["count"], len(answer["token_strs"])) == (7, 7)
    assert answer["token_strs"][:3] == ["S", "u", "m"] and answer["token_strs"][-1] == "<|end|>"
    assert server.http.post("/tokenize", json={**body, "return_token_strs": False}).json()["token_strs"] is None
    assert server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Sum é<|end|>"}


def test_health(server: Served) -> None:
    assert server.http.get("/health/live").status_code == 200
    ready = server.http.get("/health/ready")
    assert (ready.status_code, ready.json()["experts"]) == (200, dict.fromkeys(demo.EXPERTS, "up"))


def test_metrics_count(server: Served) -> None:
    before = server.metrics()
    ask(server, model="demo:gate", extra_body=LONG)
    after = server.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown("polylogit_tokens_total") == 24
    assert grown("polylogit_ticks_total") >= 24
    assert grown("polylogit_finished_sequences_total{reason=length}") == 1
    assert grown("polylogit_tick_seconds_count") >= 24
    assert grown("polylogit_time_to_first_token_seconds_count") == 1
    assert grown("polylogit_http_requests_total{outcome=ok}{route=/v1/chat/completions}") == 1
    for name in demo.EXPERTS:
        label = f"{{expert={name}}}"
        assert after[f"polylogit_expert_up{label}"] == 1
        assert after[f"polylogit_expert_restarts_total{label}"] == 0
        assert grown(f"polylogit_expert_weight_count{label}") == 24
        assert 0 < grown(f"polylogit_expert_weight_sum{label}") < 24
        assert grown(f"polylogit_expert_step_seconds_count{label}") >= 24
        assert grown(f"polylogit_expert_barrier_wait_seconds_total{label}") >= 0
    assert sum(grown(f"polylogit_expert_weight_sum{{expert={name}}}") for name in demo.EXPERTS) == pytest.approx(24)
    assert after["polylogit_queued_sequences"] == after["polylogit_running_sequences"] == 0


def test_sigterm_lets_a_running_answer_finish(server: Served) -> None:
    """The last test of this file: it ends the server."""
    expected = text_of(server, max_tokens=400, extra_body=LONG)
    stream = iter(ask(server, max_tokens=400, extra_body=LONG, stream=True))
    text = "".join((next(stream).choices[0].delta.content or "") for _ in range(5))
    server.terminate()
    until(lambda: server.http.get("/health/ready").status_code == 503, limit=5, what="ready is 503")
    refused = server.http.post("/v1/chat/completions", json={"messages": QUESTION})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded_error")
    assert "retry-after" in refused.headers
    started = time.monotonic()
    assert server.metrics()["polylogit_ready"] == 0
    assert time.monotonic() - started < 1
    chunks = list(stream)
    text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.ended() == 0, server.errors()[-2000:]
    assert not server.left_behind()
