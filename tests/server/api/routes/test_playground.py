"""The playground's files over HTTP: open, cacheable, packaged, and with a policy that allows nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.api.deployment import deployment
from tests.support.api.in_process import Served, served
from tests.support.paths import ROOT

FOLDER = ROOT / "server" / "api" / "static"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")


async def test_page(api: Served) -> None:
    page = await api.http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    head = await api.http.head("/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(page.content))


async def test_unchanged_files_are_not_sent_again(api: Served) -> None:
    for path in ("/", *(f"/playground/{name}" for name in FILES)):
        first = await api.http.get(path)
        assert first.status_code == 200 and first.headers["cache-control"] == "no-cache"
        again = await api.http.get(path, headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2fapp.py", "%2e%2e/app.py"])
async def test_other_names(api: Served, name: str) -> None:
    answer = await api.http.get(f"/playground/{name}")
    assert answer.status_code == 404 and "error" in answer.json()


async def test_deployment(api: Served) -> None:
    assert (await api.http.get("/playground/deployment")).json() == {
        "name": "duo",
        "default_policy": "uniform",
        "policies": ["uniform", "product"],
        "experts": ["math", "text"],
        "examples": ["Hello!"],
    }


async def test_only_the_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYLOGIT_API_KEYS", "secret")
    async with served(deployment(tmp_path)) as server:
        for path in ("/", *(f"/playground/{name}" for name in FILES)):
            assert (await server.http.get(path)).status_code == 200
            assert (await server.http.post(path)).status_code == 401
        assert (await server.http.get("/playground/deployment")).status_code == 401
        assert (await server.http.get("/v1/models")).status_code == 401


def test_nothing_comes_from_elsewhere() -> None:
    for name in ["index.html", *FILES]:
        source = (FOLDER / name).read_text(encoding="utf-8")
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", source)) - {"http://www.w3.org"}  # SVG's namespace
        assert not addresses, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", source), name


def test_wheel_holds_the_page(tmp_path: Path) -> None:
    root = ROOT
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    assert {f"server/api/static/{name}" for name in ["index.html", *FILES]} <= set(zipfile.ZipFile(wheel).namelist())
