"""The Prometheus configuration and rules as promtool sees them; that every alert can fire; that all metrics exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.support import promtool
from tests.support.paths import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
CASES = Path(__file__).with_name("alerts.yml")
RECORDED = Path(__file__).with_name("recording.yml")


def rules() -> list[dict[str, str]]:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def test_the_configuration_is_valid() -> None:
    promtool.run("check", "config", str(PROMETHEUS / "prometheus.yml"))


def test_the_rules_are_valid() -> None:
    for file in RULES:
        assert "SUCCESS" in promtool.run("check", "rules", str(file))


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool.run("test", "rules", str(CASES))


def test_shares_and_bytes_are_those_of_a_token() -> None:
    promtool.run("test", "rules", str(RECORDED))


def test_every_alert_has_a_case() -> None:
    cases = CASES.read_text(encoding="utf-8")
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]
    assert alerts and not [alert for alert in alerts if f'alertname="{alert}"' not in cases]


def test_rules_name_metrics_that_exist(exposed: set[str]) -> None:
    for rule in rules():
        names = re.findall(r"(?<!:)\bpolylogit_\w+", re.sub(r"\w+:polylogit\w+:\w+", "", rule["expr"]))
        assert set(names) <= exposed, rule


def test_alerts_use_recorded_series_that_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name in re.findall(r"\w+:polylogit\w+:\w+", rule["expr"])}
    assert used and used <= recorded
