"""The compose files: valid by the specification's schema, and what we promise of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server import supervisor
from server.config import Config, load_config
from tests.deploy.compose import DEPLOY, ROOT, here, load, mounts, seconds

SCHEMA = json.loads((Path(__file__).parent / "schema" / "compose-spec.json").read_text(encoding="utf-8"))
FILES = sorted(file.name for file in DEPLOY.glob("compose*.yaml"))
SERVICES = load("compose.yaml")["services"]


def problems(data: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(data)]


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def configuration(service: dict[str, Any]) -> Config:
    """What a polylogit service serves."""
    return load_config(here(service, service["command"][1]))


@pytest.mark.parametrize("file", FILES)
def test_valid_by_the_specification(file: str) -> None:
    assert problems(load(file)) == []


@pytest.mark.parametrize(
    "wrong", [{"servces": {}}, {"services": {"a": {"imge": "b"}}}, {"services": {"a": {"read_only": []}}}]
)
def test_the_schema_finds_faults(wrong: dict[str, Any]) -> None:
    assert problems(wrong)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_docker_compose_reads_it(profile: str) -> None:
    """With its own loader: variables, merge keys and dependencies between profiles resolve."""
    if (program := shutil.which("docker-compose")) is None:
        pytest.skip("Docker Compose's docker-compose is not installed")
    command = [program, "-f", DEPLOY / "compose.yaml", "--profile", profile, "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = {name for name, service in SERVICES.items() if profile in service["profiles"]}
    assert set(json.loads(done.stdout)["services"]) == expected


def test_profiles_are_whole() -> None:
    """Either profile brings one polylogit and both of what watches it."""
    for profile, polylogit in [("cpu", "demo"), ("gpu", "server")]:
        chosen = {name for name, service in SERVICES.items() if profile in service["profiles"]}
        assert chosen == {polylogit, "prometheus", "grafana"}


def test_hardened(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert {"mem_limit", "pids_limit", "healthcheck", "logging"} <= service.keys()
    assert "privileged" not in service


def test_ports_are_on_loopback(service: dict[str, Any]) -> None:
    assert [port for port in service["ports"] if not port.startswith("127.0.0.1:")] == []


def test_images_are_pinned(service: dict[str, Any]) -> None:
    """To a release, or built here from a target of the Dockerfile."""
    if "build" in service:
        targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
        assert service["build"]["target"] in targets
    else:
        assert re.search(r":v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?$", service["image"])


def test_what_is_mounted_exists(service: dict[str, Any]) -> None:
    volumes = load("compose.yaml")["volumes"]
    for mount in mounts(service):
        if mount.path is not None:
            assert mount.path.exists(), mount.source
        elif not mount.source.startswith("/"):
            assert mount.source in volumes


@pytest.mark.parametrize("name", ["demo", "server"])
def test_the_grace_period_outlasts_the_drain(name: str) -> None:
    """Docker kills what has not ended by then."""
    drain = configuration(SERVICES[name]).limits.grace_seconds + 2 * supervisor._REAP_SECONDS
    assert seconds(SERVICES[name]["stop_grace_period"]) > drain


def test_a_start_is_not_unhealthy() -> None:
    """The container counts as starting for as long as the server may take to start."""
    limits = configuration(SERVICES["server"]).limits
    assert seconds(SERVICES["server"]["healthcheck"]["start_period"]) >= limits.start_seconds


def test_each_expert_has_the_gpus_that_it_names() -> None:
    [reservation] = SERVICES["server"]["deploy"]["resources"]["reservations"]["devices"]
    named = [gpu for expert in configuration(SERVICES["server"]).experts for gpu in expert.gpus or ()]
    assert named == list(range(len(reservation["device_ids"])))
    assert "gpu" in reservation["capabilities"]


def test_what_watches_finds_what_it_watches() -> None:
    """Prometheus's target and Grafana's data source are services of the file, at the ports they listen on."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    [job] = prometheus["scrape_configs"]
    for name in ("demo", "server"):
        [alias] = SERVICES[name]["networks"]["default"]["aliases"]
        assert job["static_configs"] == [{"targets": [f"{alias}:{configuration(SERVICES[name]).http.port}"]}]
    sources = DEPLOY / "grafana" / "provisioning" / "datasources"
    [source] = [found for file in sources.iterdir() for found in yaml.safe_load(file.read_text())["datasources"]]
    assert source["url"] == "http://prometheus:9090"


def test_keys_come_from_files() -> None:
    """compose.keys.yaml gives each service the file whose path its own configuration has, commented out."""
    keys = load("compose.keys.yaml")
    for name, file in [("server", "gpu.yaml"), ("prometheus", "prometheus/prometheus.yml")]:
        [secret] = keys["services"][name]["secrets"]
        assert f"/run/secrets/{secret}" in (DEPLOY / file).read_text(encoding="utf-8")
        assert "file" in keys["secrets"][secret]
