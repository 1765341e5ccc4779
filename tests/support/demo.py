"""The demo's experts and prompts, and configurations over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.paths import DEMO

EXPERTS = ["math", "text", "chat"]
VOCABULARY = 264
EOS = 258


def model(name: str) -> Path:
    return DEMO / "experts" / name


def conversations(count: int) -> list[list[dict[str, str]]]:
    """`count` of the held-out prompts, spread over the whole file so that every domain is among them."""
    lines = (DEMO / "prompts" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // count)][:count]
    assert len(chosen) == count
    return [json.loads(line)["messages"] for line in chosen]


def configuration(*, experts: list[str] = EXPERTS, **changes: Any) -> dict[str, Any]:
    """What a configuration file over the demo's experts holds; `changes` replaces top-level keys, `expert` adds keys to
    every expert, `only` adds keys to the expert it names."""
    every, only = changes.pop("expert", {}), changes.pop("only", {})
    base = {"dtype": "float32", "kv_cache_memory": "64MiB"}
    return {
        "name": "demo",
        "experts": [
            {"name": name, "model": str(model(name)), **base, **every, **only.get(name, {})} for name in experts
        ],
        **changes,
    }
