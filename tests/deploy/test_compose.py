"""The compose files: valid by the specification's schema, and what we promise of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from server.config import Config, load_config
from server.errors import StartError
from server.launch import supervisor
from server.launch.check import Finding, check
from server.remote.handshake import KEY_VARIABLE
from tests.support.compose import DEPLOY, ROOT, here, load, mounts, seconds

SCHEMA = json.loads((Path(__file__).parent / "schema" / "compose-spec.json").read_text(encoding="utf-8"))
FILES = sorted(file.name for file in DEPLOY.glob("compose*.yaml"))
MORE = load("compose.two-hosts.yaml")["services"]
"""Goes on top of compose.yaml: what both files name is merged."""
SERVICES = {**MORE, **load("compose.yaml")["services"]}
SERVING = ["demo", "server", "api"]
EXPERTS = [name for name in SERVICES if SERVICES[name].get("command", [""])[0] == "expert"]


def problems(data: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(data)]


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def chosen(profile: str) -> set[str]:
    """The services that `profile` starts, with both files."""
    files = [SERVICES, MORE]
    return {name for services in files for name, service in services.items() if profile in service["profiles"]}


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


@pytest.mark.parametrize("profile", ["cpu", "gpu", "api", "expert"])
def test_docker_compose_reads_it(profile: str) -> None:
    """With its own loader: variables, merge keys and dependencies between profiles resolve."""
    if (program := shutil.which("docker-compose")) is None:
        pytest.skip("Docker Compose's docker-compose is not installed")
    names = ["compose.yaml"] if profile in ("cpu", "gpu") else ["compose.yaml", "compose.two-hosts.yaml"]
    names += {"gpu": ["compose.keys.yaml"], "api": ["compose.two-hosts.keys.yaml"]}.get(profile, [])
    files = [argument for name in names for argument in ("-f", DEPLOY / name)]
    command = [program, *files, "--profile", profile, "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["services"]) == chosen(profile)


def test_profiles_are_whole() -> None:
    """Each profile brings one polylogit and both of what watches it, or the other host's experts."""
    for profile, polylogit in [("cpu", "demo"), ("gpu", "server"), ("api", "api")]:
        assert chosen(profile) == {polylogit, "prometheus", "grafana"}
    assert chosen("expert") == set(EXPERTS)


def test_hardened(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert {"mem_limit", "pids_limit", "healthcheck", "logging"} <= service.keys()
    assert "privileged" not in service


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - set(EXPERTS)))
def test_ports_are_on_loopback(name: str) -> None:
    assert [port for port in SERVICES[name]["ports"] if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_is_found_at_its_address(name: str) -> None:
    """Only there; it listens at that port, and its health check asks for it."""
    _, _, expert, _, listen = SERVICES[name]["command"]
    [found] = [each for each in configuration(SERVICES[name]).experts if each.name == expert]
    assert found.address is not None
    port = found.address.partition(":")[2]
    assert SERVICES[name]["ports"] == [f"{found.address}:{port}"]
    assert listen == f"0.0.0.0:{port}"
    assert SERVICES[name]["healthcheck"]["test"][-1] == port


def test_every_expert_of_two_hosts_runs_once() -> None:
    """One configuration for both hosts; what has an address has a service of its own."""
    config = configuration(SERVICES["api"])
    assert [SERVICES[name]["command"][2] for name in EXPERTS] == [one.name for one in config.experts if one.address]
    assert all(mounts(SERVICES[name]) == mounts(SERVICES["api"]) for name in EXPERTS)


@pytest.mark.parametrize("name", ["api", *EXPERTS])
def test_the_cluster_key_is_a_secret(name: str) -> None:
    [secret] = SERVICES[name]["secrets"]
    assert configuration(SERVICES[name]).cluster_key_file == f"/run/secrets/{secret}"
    assert "file" in load("compose.two-hosts.yaml")["secrets"][secret]
    assert "POLYLOGIT_CLUSTER_KEY" not in SERVICES[name].get("environment", {})


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


@pytest.mark.parametrize("name", ["server", "api", *EXPERTS])
@pytest.mark.parametrize("given", ["./mine.yaml", "mine.yaml", "../mine.yaml", "/srv/mine.yaml"])
def test_paths_of_the_user_are_mounted_as_they_are(name: str, given: str) -> None:
    """However they are written; Docker makes none that is missing, and the container changes none."""
    file = "compose.yaml" if name == "server" else "compose.two-hosts.yaml"
    service = load(file, POLYLOGIT_CONFIG=given, POLYLOGIT_MODELS="models")["services"][name]
    binds = {volume["target"]: volume for volume in service["volumes"] if isinstance(volume, dict)}
    assert set(binds) == {"/etc/polylogit/polylogit.yaml", "/models"}
    for bind in binds.values():
        assert (bind["type"], bind["read_only"], bind["bind"]["create_host_path"]) == ("bind", True, False)
    if not given.startswith("/"):
        assert here(service, "/etc/polylogit/polylogit.yaml").resolve() == (DEPLOY / given).resolve()


@pytest.mark.parametrize("name", [*SERVING, *EXPERTS])
def test_the_grace_period_outlasts_the_drain(name: str) -> None:
    """Docker kills what has not ended by then."""
    drain = configuration(SERVICES[name]).limits.grace_seconds + 2 * supervisor._REAP_SECONDS
    assert seconds(SERVICES[name]["stop_grace_period"]) > drain


@pytest.mark.parametrize("name", ["server", "api", *EXPERTS])
def test_a_start_is_not_unhealthy(name: str) -> None:
    """The container counts as starting for as long as the server may take to start."""
    limits = configuration(SERVICES[name]).limits
    assert seconds(SERVICES[name]["healthcheck"]["start_period"]) >= limits.start_seconds


@pytest.mark.parametrize("name", ["server", "api", *EXPERTS])
def test_each_expert_has_the_gpus_that_it_names(name: str) -> None:
    """Its container has those of all experts of the host: the configuration's indices count within them."""
    [reservation] = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
    experts = configuration(SERVICES[name]).experts
    host = next((one.host for one in experts if one.name == SERVICES[name]["command"][2]), None)
    named = [gpu for expert in experts if expert.host == host for gpu in expert.gpus or ()]
    assert named == list(range(len(reservation["device_ids"])))
    assert "gpu" in reservation["capabilities"]


def test_what_watches_finds_what_it_watches() -> None:
    """Prometheus's target and Grafana's data source are services of the file, at the ports they listen on."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    [job] = prometheus["scrape_configs"]
    for name in SERVING:
        [alias] = SERVICES[name]["networks"]["default"]["aliases"]
        assert job["static_configs"] == [{"targets": [f"{alias}:{configuration(SERVICES[name]).http.port}"]}]
    sources = DEPLOY / "grafana" / "provisioning" / "datasources"
    [source] = [found for file in sources.iterdir() for found in yaml.safe_load(file.read_text())["datasources"]]
    assert source["url"] == "http://prometheus:9090"


@pytest.mark.parametrize(
    ("file", "name", "configured"),
    [("compose.keys.yaml", "server", "gpu.yaml"), ("compose.two-hosts.keys.yaml", "api", "two-hosts.yaml")],
)
def test_keys_come_from_files(file: str, name: str, configured: str) -> None:
    """Each service is given the file whose path its own configuration has, commented out."""
    keys = load(file)
    assert set(keys["services"]) == {name, "prometheus"} <= set(SERVICES)
    for one, place in [(name, configured), ("prometheus", "prometheus/prometheus.yml")]:
        [secret] = keys["services"][one]["secrets"]
        [line] = [line for line in (DEPLOY / place).read_text(encoding="utf-8").splitlines() if secret in line]
        assert "# " in line and f"/run/secrets/{secret}" in line
        assert "file" in keys["secrets"][secret]


def test_the_other_host_needs_no_api_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration is the same on both; only where the API is are its keys."""
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    monkeypatch.setattr("server.launch.check.gpu_count", lambda: None)
    text = (DEPLOY / "two-hosts.yaml").read_text(encoding="utf-8").replace("# api_keys_file:", "api_keys_file:")
    (tmp_path / "two-hosts.yaml").write_text(text, encoding="utf-8")
    given = load_config(tmp_path / "two-hosts.yaml")
    assert given.http.api_keys_file == "/run/secrets/polylogit_keys"
    assert check(with_models_of_the_demo(given), "10.0.0.2")
    with pytest.raises(StartError, match=r"^http\.api_keys_file: no file at /run/secrets/polylogit_keys$"):
        check(with_models_of_the_demo(given))


def with_models_of_the_demo(given: Config) -> Config:
    """In place of the user's; the cluster key from the environment."""
    models = zip(given.experts, ["math", "text", "chat"], strict=True)
    experts = [
        msgspec.structs.replace(one, model=str(DEPLOY / "demo" / "experts" / name), max_model_len=None)
        for one, name in models
    ]
    return msgspec.structs.replace(given, experts=experts, cluster_key_file=None)


@pytest.mark.parametrize("host", [None, "10.0.0.2"])
def test_two_hosts_pass_the_check(host: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either host, with the demo's models in place of the user's."""
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    monkeypatch.setattr("server.launch.check.gpu_count", lambda: {None: 1, "10.0.0.2": 2}[host])
    found = check(with_models_of_the_demo(configuration(SERVICES["api"])), host)
    assert Finding("devices", "no conflicts") in found
    assert Finding("cluster key", "given") in found
