"""The dashboards as files: what Grafana needs of them, and that they name metrics that exist.

That their queries return data is shown over a real server in tests/e2e/test_dashboards.py.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.render import formatted
from tests.support import promtool
from tests.support.paths import ROOT

GRAFANA = ROOT / "deploy" / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
TYPES = {"timeseries", "heatmap", "stat", "bargauge"}
UNITS = {"none", "short", "percentunit", "s", "reqps", "cps", "ops", "bytes"}


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_there_are_two_and_they_link_to_each_other() -> None:
    boards = {board["uid"]: board for board in (json.loads(file.read_text(encoding="utf-8")) for file in FILES)}
    assert set(boards) == {"polylogit-overview", "polylogit-experts"}
    links = {uid: [link["url"] for link in board["links"]] for uid, board in boards.items()}
    assert links == {"polylogit-overview": ["/d/polylogit-experts"], "polylogit-experts": ["/d/polylogit-overview"]}


def test_panels_say_what_they_show(dashboard: dict[str, Any]) -> None:
    assert dashboard["schemaVersion"] >= 39 and "id" not in dashboard
    for panel in panels(dashboard):
        assert panel["type"] in TYPES and panel["title"] and panel["description"].endswith("."), panel["title"]
        options = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]
        assert options["unit"] in UNITS, panel["title"]


def test_panels_have_a_place_of_their_own(dashboard: dict[str, Any]) -> None:
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(identities) == len(set(identities))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_queries_ask_the_chosen_source_and_servers(dashboard: dict[str, Any]) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    names = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert names["datasource"] == "datasource"
    for panel in panels(dashboard):
        assert panel["datasource"] == source
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert 'instance=~"$instance"' in target["expr"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*names, "__rate_interval", "__range"}


def test_queries_name_metrics_that_exist(dashboard: dict[str, Any], exposed: set[str]) -> None:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            found = re.findall(r"\b(?:polylogit|process)_\w+", re.sub(r'"[^"]*"', "", target["expr"]))
            assert found and set(found) <= exposed, target["expr"]


@pytest.mark.parametrize(
    ("dies", "samples", "state"),
    [("it does not", "1x8", 1), ("it drains", "1x4 0x4", 0), ("it is gone", "1x4 stale", 0)],
)
def test_the_state_is_that_of_the_worst_server(tmp_path: Path, dies: str, samples: str, state: int) -> None:
    """Of two, one of which ends; a query over a range would go on with the last value that it had."""
    board = json.loads((GRAFANA / "dashboards" / "overview.json").read_text(encoding="utf-8"))
    [target] = next(panel["targets"] for panel in panels(board) if panel["title"] == "State")
    assert target["instant"] and not target["range"]
    series = {
        'up{job="polylogit", instance="a"}': "1x8",
        'up{job="polylogit", instance="b"}': "1x4 0x4" if dies == "it is gone" else "1x8",
        'polylogit_ready{job="polylogit", instance="a"}': "1x8",
        'polylogit_ready{job="polylogit", instance="b"}': samples,
    }
    asked = {
        "expr": target["expr"].replace("$instance", ".*"),
        "eval_time": "8m",
        "exp_samples": [{"labels": "{}", "value": state}],
    }
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    case = {"interval": "1m", "input_series": inputs, "promql_expr_test": [asked]}
    file = tmp_path / "state.yml"
    file.write_text(yaml.safe_dump({"tests": [case]}), encoding="utf-8")
    promtool.run("test", "rules", str(file))


def test_provisioning_knows_the_source_that_compose_has() -> None:
    provisioning = GRAFANA / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    [provider] = yaml.safe_load((provisioning / "dashboards" / "polylogit.yml").read_text("utf-8"))["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.0, "bytes", "12 B"),
        (1536.0, "bytes", "1.5 KiB"),
        (3 * 2**20, "bytes", "3 MiB"),
        (0.25, "percentunit", "25%"),
    ],
)
def test_a_drawn_dashboard_has_grafanas_units(value: float, unit: str, text: str) -> None:
    assert formatted(value, unit) == text
