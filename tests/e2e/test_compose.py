"""What deploy/compose.yaml describes, as plain processes: the commands, environments and mounted files are read from
it. Containers themselves are not started here."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import compose
from tests.support.server_process import Served, until

HEALTHCHECK = compose.ROOT / "docker" / "healthcheck.py"


@pytest.fixture
def prometheus(demo_server: Served, tmp_path: Path) -> Iterator[httpx.Client]:
    """The compose file's Prometheus, on a free port. Its target's name, which only containers know, is replaced."""
    if (program := shutil.which("prometheus")) is None:
        pytest.skip("Prometheus is not installed (apt-get install prometheus)")
    service = compose.load("compose.yaml")["services"]["prometheus"]
    for mount in compose.mounts(service):
        inside = tmp_path / mount.target.lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        if mount.path is None:
            inside.mkdir()
        elif mount.path.is_dir():
            shutil.copytree(mount.path, inside)
        else:
            shutil.copy(mount.path, inside)
    configuration = tmp_path / "etc" / "prometheus" / "prometheus.yml"
    text = configuration.read_text(encoding="utf-8")
    assert text.count("polylogit:8000") == 1
    configuration.write_text(text.replace("polylogit:8000", demo_server.url.removeprefix("http://")), encoding="utf-8")
    arguments = [argument.replace("=/", f"={tmp_path}/") for argument in service["command"]]
    with _running([program, *arguments], tmp_path) as client:
        yield client


@contextlib.contextmanager
def _running(command: list[str], directory: Path) -> Iterator[httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def test_the_demo_answers(demo_server: Served) -> None:
    answer = demo_server.openai.chat.completions.create(
        model="polylogit-demo",
        messages=[{"role": "user", "content": "Add 27 and 58, then reverse stone."}],
        temperature=0,
    )
    assert answer.choices[0].message.content == "85, enots"


def test_the_health_check_finds_it_ready(demo_server: Served) -> None:
    environment = {**os.environ, "POLYLOGIT_PORT": demo_server.url.rpartition(":")[2]}
    done = subprocess.run([sys.executable, HEALTHCHECK], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_prometheus_scrapes_it(prometheus: httpx.Client) -> None:
    """With the compose file's command and the shipped configuration: the target is up, and the rules are loaded."""

    def targets() -> list[dict[str, str]]:
        try:
            found = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
        except (httpx.HTTPError, ValueError):  # not up yet
            return []
        return [target for target in found if target["health"] != "unknown"]

    [target] = until(targets, limit=60, what="a scrape")
    assert target["health"] == "up", target["lastError"]
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert {Path(group["file"]).name for group in groups} == {
        file.name for file in (compose.DEPLOY / "prometheus" / "rules").glob("*.yml")
    }
