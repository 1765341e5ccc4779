"""`polylogit record` over real engines: what is kept is what transformers computes, interrupted or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gate.training import records
from gate.training.records import open_shard, read_manifest, shards
from server.cli import main
from tests.support import demo
from tests.support.oracle.huggingface import Reference

PROMPTS = 6
EXPERTS = ["math", "chat"]
PARTS = ["tokens", "topk_ids", "topk_logprobs", "rest", "token_logprobs"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (demo.DEMO / "prompts" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path_factory.mktemp("record") / "prompts.jsonl"
    path.write_text("\n".join(lines[:: len(lines) // PROMPTS][:PROMPTS]) + "\n", encoding="utf-8")
    return path


def record(prompts: Path, output: Path, *more: str) -> int:
    config = prompts.with_name("polylogit.yaml")
    config.write_text(yaml.safe_dump(demo.configuration(experts=EXPERTS)), encoding="utf-8")
    command = ["record", str(config), "--prompts", str(prompts), "--grader", "exact", "--answers"]
    return main(["--log-level", "error", *command, "--output", str(output), "--max-tokens", "24", *more])


def responses(directory: Path) -> dict[int, dict[str, Any]]:
    """Task -> what the shards say of its response."""
    found: dict[int, dict[str, Any]] = {}
    for path in shards(directory):
        with open_shard(path) as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ids = json.loads(file.metadata()["ids"])
        ends = np.cumsum(arrays["lengths"])
        for row, (end, length) in enumerate(zip(ends, arrays["lengths"], strict=True)):
            task = int(arrays["tasks"][row])
            assert task not in found
            found[task] = {
                "prompt": ids[row],
                "source": int(arrays["sources"][row]),
                "reward": float(arrays["rewards"][row]),
                **{
                    name: arrays[name][end - length : end]
                    for name in (*PARTS, *(f"hidden.{i}" for i in range(len(EXPERTS))))
                },
            }
    return found


@pytest.mark.timeout(400)
def test_records_are_what_the_experts_show_and_interruptions_change_nothing(
    prompts: Path,
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "records"
    monkeypatch.setattr(records, "SHARD_BYTES", 20_000)
    policies = ("--policies", "math,chat,uniform")
    assert record(prompts, output, *policies) == 0
    whole = responses(output)
    assert sorted(whole) == list(range(4 * PROMPTS))
    manifest = read_manifest(output)
    assert manifest.sources == ["answer", "math", "chat", "uniform"]
    rows = {row["id"]: row for row in map(json.loads, prompts.read_text().splitlines())}
    for each in whole.values():
        check_against(reference, rows[each["prompt"]], each, manifest.sources[each["source"]])

    assert len(shards(output)) > 3
    for path in shards(output)[1:3]:
        path.unlink()
    missing = len(whole) - len(responses(output))
    assert 0 < missing < len(whole)
    assert record(prompts, output, *policies) == 0
    again = responses(output)
    assert {task: each["tokens"].tolist() for task, each in again.items()} == {
        task: each["tokens"].tolist() for task, each in whole.items()
    }
    capsys.readouterr()
    assert record(prompts, output, *policies) == 0  # starts no engine
    assert "all 24 responses are there" in capsys.readouterr().err
    assert record(prompts, output, *policies, "--seed", "1") == 1
    assert "settings.seed was 0, is now 1" in capsys.readouterr().err


def check_against(reference: Reference, row: dict[str, Any], found: dict[str, Any], source: str) -> None:
    """Lists and hidden states of every token of a response, and its reward."""
    prompt, tokens = reference.encode(row["messages"]), found["tokens"].tolist()
    logprobs = reference.logprobs(prompt + tokens)[:, len(prompt) - 1 : -1]  # [E, T, V]
    text = reference.tokenizer.decode(tokens, skip_special_tokens=True)
    assert found["reward"] == float(tokens[-1] == demo.EOS and text.strip() == row["answer"])
    if source == "answer":
        assert found["reward"] == 1.0
    for expert, name in enumerate(EXPERTS):
        number = demo.EXPERTS.index(name)
        listed = torch.from_numpy(found["topk_ids"][:, expert].astype(np.int64))
        expected = logprobs[number].gather(1, listed)
        shown = torch.from_numpy(found["topk_logprobs"][:, expert].astype(np.float64))
        torch.testing.assert_close(shown, expected, atol=5e-3, rtol=5e-3)
        assert (shown.diff(dim=1) <= 0).all()
        own = torch.from_numpy(found["token_logprobs"][:, expert].astype(np.float64))
        chosen = torch.from_numpy(found["tokens"].astype(np.int64))
        torch.testing.assert_close(own, logprobs[number].gather(1, chosen[:, None])[:, 0], atol=1e-3, rtol=1e-3)
        rest = torch.from_numpy(found["rest"][:, expert].astype(np.float64)).exp()
        torch.testing.assert_close(rest, 1 - expected.exp().sum(1), atol=1e-5, rtol=1e-2)
        hidden = torch.from_numpy(found[f"hidden.{expert}"].astype(np.float32))
        again = reference.models[number].lm_head(hidden).log_softmax(-1).double()
        torch.testing.assert_close(again.gather(1, listed).detach(), expected, atol=2e-2, rtol=2e-2)
