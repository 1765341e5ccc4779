"""Debian's Prometheus over a running server, with the project's own configuration and rules, but quicker."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from deploy.grafana.render import Prometheus
from tests.support.paths import ROOT
from tests.support.server_process import until

CONFIGURATION = ROOT / "deploy" / "prometheus" / "prometheus.yml"
START_SECONDS = 60.0


@contextlib.contextmanager
def scraping(target: str, directory: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port) every second, once it has. Skips where there is none."""
    if (program := shutil.which("prometheus")) is None:
        pytest.skip("Prometheus is not installed (apt-get install prometheus)")
    port = _free_port()
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(_configuration(target)), encoding="utf-8")
    command = [program, f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        until(lambda: _up(prometheus), limit=START_SECONDS, what="Prometheus has scraped the server")
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(30)


def _configuration(target: str) -> object:
    data = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    data["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    data["rule_files"] = [str(CONFIGURATION.parent / pattern) for pattern in data["rule_files"]]
    [job] = data["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    return data


def _up(prometheus: Prometheus) -> bool:
    try:
        return any(target["health"] == "up" for target in prometheus.get("targets")["activeTargets"])
    except httpx.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
