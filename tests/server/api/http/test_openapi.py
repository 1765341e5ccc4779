"""schemathesis over /openapi.json: no status and no content type that is not declared, no 5xx."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.support.api.deployment import END, ids
from tests.support.api.fake_coordinator import Script
from tests.support.api.in_process import Served

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
)
SECONDS = 120


async def test_schemathesis_finds_nothing(api: Served, tmp_path: Path) -> None:
    api.fake.script = Script(tokens=lambda sequence: [*sequence.given, *ids("Hello"), END])
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).with_name("schemathesis"), "run", f"{api.url}/openapi.json", "--checks", CHECKS),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1", "--no-color"),
        *("--generation-database", "none", "--request-timeout", "30"),
        cwd=tmp_path,  # it keeps a cache where it runs
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    text = output.decode(errors="replace")
    assert process.returncode == 0, text[-5000:]
    assert "Tested: 11" in text, text[-2000:]
    assert any(sequence.max_tokens == 8 for sequence in api.fake.submitted)  # an example got through
