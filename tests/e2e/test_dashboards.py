"""Every query of every dashboard panel, and every rule, over a real Prometheus that scrapes the real server in use."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.grafana.render import Prometheus, View, render, repeated
from tests.support import demo
from tests.support.paths import ROOT
from tests.support.prometheus import scraping
from tests.support.server_process import Served, until

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
CLIENTS = 4
SECONDS = 8.0


@pytest.fixture(scope="module")
def traffic(demo_server: Served) -> Iterator[None]:
    """Answers by the gate and by uniform weights, some with log-probabilities, streams, and a client that errs, until
    the tests are done."""
    stop = threading.Event()
    prompts = demo.conversations(40)

    def ask(number: int) -> None:
        while not stop.is_set():
            for place, messages in enumerate(prompts):
                model = "polylogit-demo" if place % 3 else "polylogit-demo:uniform"
                create = demo_server.openai.chat.completions.create
                sampled = {"seed": number, "max_tokens": 40, "logprobs": place % 2 == 0}
                for _ in create(model=model, messages=messages, stream=True, **sampled):
                    pass
                with pytest.raises(openai.NotFoundError):
                    create(model="made-up", messages=messages)
                if stop.is_set():
                    return

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    yield
    stop.set()
    for client in clients:
        client.join()


@pytest.fixture(scope="module")
def prometheus(demo_server: Served, traffic: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped for a while."""
    with scraping(demo_server.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")) as prometheus:
        until(lambda: scrapes(prometheus) >= SECONDS, limit=60, what=f"{SECONDS:g} scrapes")
        yield prometheus


def scrapes(prometheus: Prometheus) -> float:
    found = prometheus.at("count_over_time(polylogit_ready[1m])", time.time())
    return found[0].values[0] if found else 0.0


@pytest.fixture
def view() -> View:
    """The last seconds, with every variable on All."""
    now = time.time()
    return View(now - SECONDS, now, 1.0, {"instance": ".*", "expert": ".*", "__rate_interval": "5s"})


def has_data(prometheus: Prometheus, view: View, target: dict[str, Any], own: dict[str, str]) -> bool:
    return any(math.isfinite(value) for found in view.read(prometheus, target, **own) for value in found.values)


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_query_returns_data(prometheus: Prometheus, view: View, file: Path) -> None:
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    placed = [
        (panel, own) for panel, own in repeated(dashboard["panels"], {"expert": demo.EXPERTS}) if panel["type"] != "row"
    ]
    empty = [
        (panel["title"], view.fill(target["expr"], **own))
        for panel, own in placed
        for target in panel["targets"]
        if not has_data(prometheus, view, target, own)
    ]
    assert len(placed) > 20 and not empty


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_variables_find_what_is_there(prometheus: Prometheus, view: View, file: Path) -> None:
    dashboard = json.loads(file.read_text(encoding="utf-8"))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert found is not None
        values = {series.labels[found[2]] for series in prometheus.at(view.fill(found[1]), view.end)}
        assert values == set(demo.EXPERTS) if variable["name"] == "expert" else len(values) == 1


def test_annotations_can_be_asked(prometheus: Prometheus, view: View) -> None:
    for file in DASHBOARDS:
        for annotation in json.loads(file.read_text(encoding="utf-8"))["annotations"]["list"]:
            if "expr" in annotation:
                assert prometheus.over(view.fill(annotation["expr"]), view.start, view.end, 1.0) == []  # no restart


def test_every_rule_is_evaluated_and_no_alert_fires(prometheus: Prometheus, view: View) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 20
    until(
        lambda: all(rule["health"] == "ok" for group in prometheus.get("rules")["groups"] for rule in group["rules"]),
        limit=30,
        what="every rule is evaluated",
    )
    for rule in rules:
        if rule["type"] == "recording":
            assert any(math.isfinite(found.values[0]) for found in prometheus.at(rule["name"], view.end)), rule["name"]
    assert prometheus.at('ALERTS{alertstate="firing"}', view.end) == []


def test_whole_rows_are_as_long_as_the_vocabulary(prometheus: Prometheus, view: View) -> None:
    [tokens] = prometheus.at("sum(polylogit_whole_rows_total)", view.end)
    received = prometheus.at('polylogit_expert_received_bytes_total{kind="rows"}', view.end)
    assert {found.labels["expert"] for found in received} == set(demo.EXPERTS)
    for found in received:
        rows = found.values[0] / (4 * demo.VOCABULARY)
        assert rows.is_integer() and rows <= tokens.values[0]


def test_a_scrape_under_load_takes_less_than_a_second(prometheus: Prometheus, view: View) -> None:
    [median] = prometheus.at('quantile_over_time(0.5, scrape_duration_seconds{job="polylogit"}[1m])', view.end)
    assert 0 < median.values[0] < 1


def test_a_dashboard_is_drawn(prometheus: Prometheus, view: View, tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARDS[0].read_text(encoding="utf-8"))
    picture = tmp_path / "experts.png"
    render(prometheus, dashboard, view).savefig(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
