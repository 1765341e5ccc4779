"""A deployment served for the time of a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from server.launch.served import served


def test_a_server_that_logs_json_is_found_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ready line is printed as text only."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *"--log-format text"*serve*) echo "demo is ready on http://127.0.0.1:1 (a)";; esac\n'
        "exec sleep 60\n"
    )
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    with served(tmp_path / "polylogit.yaml", start_seconds=10.0) as url:
        assert url == "http://127.0.0.1:1"
