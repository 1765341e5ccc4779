"""Models, tokens, health, metrics, documentation."""

from __future__ import annotations

import re
import time
from typing import Any

from tests.support import promtool
from tests.support.api.deployment import CONTEXT, END, ids
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served
from tests.support.paths import ROOT


async def test_models(api: Served) -> None:
    models = {model.id: model for model in (await api.openai.models.list()).data}
    assert list(models) == ["duo", "duo:uniform", "duo:product", "duo:math", "duo:text"]
    assert models["duo"].max_model_len == CONTEXT
    assert (await api.openai.models.retrieve("duo:math")).id == "duo:math"


async def test_tokenize(api: Served) -> None:
    answer = (await api.http.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True})).json()
    assert answer == {"count": 2, "max_model_len": CONTEXT, "tokens": [72, 105], "token_strs": ["H", "i"]}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "duo:math"}
    answer = (await api.http.post("/tokenize", json=chat)).json()
    assert answer["tokens"] == ids("<|bos|><|user|>Hi<|end|><|assistant|>")


async def test_detokenize(api: Served) -> None:
    answer = await api.http.post("/detokenize", json={"tokens": [72, 105, END]})
    assert answer.json() == {"prompt": "Hi<|end|>"}
    for wrong in ([-1], [2**63], [264], "x", [1.5]):
        answer = await api.http.post("/detokenize", json={"tokens": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("tokens")


async def test_health(api: Served) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        assert (await api.http.get(path)).status_code == 200
    assert (await api.http.get("/health/ready")).json()["experts"] == {"math": "up", "text": "up"}


async def test_metrics(api: Served) -> None:
    await api.chat(stream=True)
    await api.http.get("/made/up/path")
    lines = (await api.http.get("/metrics")).text.splitlines()
    assert "polylogit_ready 1.0" in lines
    assert "polylogit_ticks_total 10.0" in lines
    assert 'polylogit_finished_sequences_total{reason="stop"} 3.0' in lines
    assert 'polylogit_tick_seconds_bucket{le="1.0"} 3.0' in lines
    assert 'polylogit_tick_seconds_bucket{le="+Inf"} 6.0' in lines
    assert 'polylogit_expert_kv_used_ratio{expert="math"} 0.25' in lines
    assert 'polylogit_normaliser_bound_nats_bucket{le="0.1"} 19.0' in lines
    assert "polylogit_normaliser_bound_nats_sum 0.375" in lines
    assert 'polylogit_whole_rows_total{reason="token"} 3.0' in lines
    assert 'polylogit_whole_rows_total{reason="logprobs"} 1.0' in lines
    assert 'polylogit_expert_received_bytes_total{expert="math",kind="lists"} 20480.0' in lines
    assert 'polylogit_expert_received_bytes_total{expert="math",kind="rows"} 4224.0' in lines
    assert any(line.startswith('polylogit_http_requests_total{outcome="client_error",route="other"}') for line in lines)
    chat = 'polylogit_http_requests_total{outcome="ok",route="/v1/chat/completions"}'
    assert any(line.startswith(chat) for line in lines)
    assert any(line.startswith("polylogit_time_to_first_token_seconds_count") for line in lines)


async def test_metrics_series_are_bounded(api: Served) -> None:
    await api.http.get("/metrics")
    before = len((await api.http.get("/metrics")).text.splitlines())
    for number in range(1000):
        assert (await api.chat(model=f"made-up-{number}")).status_code == 404
        await api.http.get(f"/path/{number}")
    after = (await api.http.get("/metrics")).text
    assert "made-up" not in after
    assert len(after.splitlines()) - before < 40


async def test_metrics_follow_the_naming_rules(api: Served) -> None:
    await api.chat(stream=True)
    promtool.run("check", "metrics", stdin=(await api.http.get("/metrics")).text)


async def test_the_pause_between_tokens_is_that_of_a_choice(api: Served) -> None:
    """Four choices that grow together are no faster than one."""

    async def mean_pause(**body: Any) -> float:
        before = await inter_token(api)
        await api.chat(max_tokens=8, **body)
        seconds, tokens = (late - early for late, early in zip(await inter_token(api), before, strict=True))
        assert tokens == 7 * body.get("n", 1)
        return seconds / tokens

    api.fake.script = Script(pause=0.02)
    assert await mean_pause() > 0.02
    assert await mean_pause(n=4) > 0.02
    assert await mean_pause(n=4, stream=True) > 0.02


async def inter_token(api: Served) -> tuple[float, float]:
    """(seconds, tokens) so far."""
    lines = (await api.http.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("polylogit_inter_token_latency_seconds_"))
    name = "polylogit_inter_token_latency_seconds"
    return float(values[f"{name}_sum"]), float(values[f"{name}_count"])


async def test_metrics_without_an_answer_from_the_coordinator(api: Served) -> None:
    """The last figures, and how old they are."""
    await api.http.get("/metrics")
    api.fake.script = Script(stats=False)
    start = time.perf_counter()
    lines = (await api.http.get("/metrics")).text.splitlines()
    assert time.perf_counter() - start < 1
    assert "polylogit_ticks_total 10.0" in lines
    age = next(line for line in lines if line.startswith("polylogit_stats_age_seconds"))
    assert float(age.split()[1]) >= 0.5


async def test_documentation(api: Served) -> None:
    schema = (await api.http.get("/openapi.json")).json()
    post = schema["paths"]["/v1/chat/completions"]["post"]
    assert {"400", "401", "404", "413", "503"} <= set(post["responses"])
    assert "422" not in str(schema)
    assert "ChatRequest" in schema["components"]["schemas"]
    assert "messages" in schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert "ErrorResponse" in schema["components"]["schemas"]
    assert (await api.http.get("/docs")).status_code == 200
    assert (await api.http.get("/version")).json()["version"]


async def test_refusals_are_declared(api: Served) -> None:
    """Also those that come before a route is asked; all as JSON."""
    paths = (await api.http.get("/openapi.json")).json()["paths"]
    assert "503" in paths["/health"]["get"]["responses"] and "503" in paths["/health/ready"]["get"]["responses"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            declared = {status: answer.get("content") for status, answer in operation["responses"].items()}
            for body in ({"headers": {"content-encoding": "gzip"}}, {"content": b"x" * 4_000_001}):
                answer = await api.http.request(method, path, **body)
                assert answer.status_code in (413, 415) and str(answer.status_code) in declared, path
            assert all(list(content) == ["application/json"] for status, content in declared.items() if status > "3")


async def test_every_metric_is_described(api: Served) -> None:
    guide = (ROOT / "docs" / "operations" / "monitoring.md").read_text(encoding="utf-8")
    await api.http.get("/metrics")
    text = (await api.http.get("/metrics")).text
    names = re.findall(r"^# TYPE (polylogit_\w+)", text, re.MULTILINE)
    assert len(names) > 40
    described = set(re.findall(r"polylogit_\w+", guide))
    described |= {f"{name}_limit" for name in described}
    assert not [name for name in names if name not in described]
