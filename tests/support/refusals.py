"""What every refusal has, whoever asked and whatever for."""

from __future__ import annotations

from typing import Any

import httpx


def refused(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error object of a refusal (400 unless said otherwise), which has all its fields and is short."""
    assert response.status_code in (statuses or (400,)), response.text[:500]
    assert len(response.content) < 20_000
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and "/site-packages/" not in error["message"]
    return dict(error)
