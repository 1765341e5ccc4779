"""Request ids, keys and other origins."""

from __future__ import annotations

import httpx
import pytest

from tests.support.api.deployment import deployment
from tests.support.api.in_process import Served, served

CHAT = "/v1/chat/completions"


async def test_request_ids(api: Served) -> None:
    answer = await api.http.get("/version", headers={"x-request-id": "a-b_c.9"})
    assert answer.headers["x-request-id"] == "a-b_c.9"
    for bad in ("a b", "x" * 129, "é".encode(), ""):
        answer = await api.http.get("/version", headers={"x-request-id": bad})
        assert len(answer.headers["x-request-id"]) == 32
    assert len((await api.http.get("/nothing")).headers["x-request-id"]) == 32
    answer = await api.chat()
    assert answer.json()["id"] == f"chatcmpl-{answer.headers['x-request-id']}"


async def test_keys(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("file-key\n\n")
    monkeypatch.setenv("POLYLOGIT_API_KEYS", "First-Key, second-key")
    http = {"api_keys_file": "keys", "cors_origins": ["https://page.example"]}
    async with served(deployment(tmp_path, http=http)) as server:
        await server.fake.status()
        for key in ("First-Key", "second-key", "file-key"):
            assert (await _models(server, f"Bearer {key}")).status_code == 200
        for header in (
            "",
            "Bearer",
            "Bearer x",
            "Bearer first-key",
            "Basic First-Key",
            "First-Key",
            "Bearer é",
        ):
            answer = await _models(server, header)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
        assert (await server.http.get("/health/live")).status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json", "/nothing", "/healthy"):
            assert (await server.http.get(path)).status_code == 401
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        asked = {"access-control-request-headers": "authorization, x-stainless-lang, x-stainless-os"}
        preflight = await server.http.options(CHAT, headers=headers | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        for wrong in ({"origin": "https://other.example"}, {"access-control-request-method": "DELETE"}):
            refused = await server.http.options(CHAT, headers=headers | wrong)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


async def _models(server: Served, header: str) -> httpx.Response:
    return await server.http.get("/v1/models", headers={"authorization": header.encode()} if header else {})


async def test_no_cors_unless_configured(api: Served) -> None:
    answer = await api.http.get("/version", headers={"origin": "https://page.example"})
    assert "access-control-allow-origin" not in answer.headers
