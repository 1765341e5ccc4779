"""Commands of docs/operations/containers.md that can be tried or judged without Docker."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

from tests.support.paths import ROOT

GUIDE = (ROOT / "docs" / "operations" / "containers.md").read_text(encoding="utf-8")


def test_servers_in_containers_can_be_reached() -> None:
    """Each whole command that starts one publishes its port, on loopback."""
    commands = re.findall(r"docker run [^`\n]*polylogit:[cg]pu(?=[`\n])", GUIDE)
    assert len(commands) == 2
    assert all(" -p 127.0.0.1:8000:8000 " in command for command in commands)


def test_keys_are_made_as_the_guide_says(tmp_path: Path) -> None:
    """Only the containers' users and root may read them; what is typed next makes files as before."""
    [block] = [block for block in GUIDE.split("```") if "secrets/metrics_key" in block]
    typed = [line for line in block.splitlines() if not line.startswith("sudo ")]
    done = subprocess.run(
        ["sh", "-euc", "\n".join(["umask 022", *typed, "touch next"])], cwd=tmp_path, timeout=30, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    secrets = tmp_path / "deploy" / "secrets"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*secrets.iterdir(), tmp_path / "next")}
    assert modes == {"metrics_key": 0o640, "api_keys": 0o640, "next": 0o644}
    keys = (secrets / "api_keys").read_text().split()
    assert len(set(keys)) == 2 and (secrets / "metrics_key").read_text().strip() in keys
