"""Shared by the tests of what stands beside the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.config import parse_config
from server.metrics.api import ApiMetrics, render
from tests.support.api.fake_coordinator import stats


@pytest.fixture
def exposed(tmp_path: Path) -> set[str]:
    """Names of the series in /metrics."""
    config = parse_config({"name": "x", "experts": [{"name": "math", "model": "math"}]}, directory=tmp_path)
    text = render(ApiMetrics(config), stats(), age=0.0, ready=True).decode()
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
