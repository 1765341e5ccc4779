"""Clients that people point at an OpenAI endpoint, as they are run: benchmark, evaluation harness, agent."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from pydantic import Field

from gate.evaluation.endpoint import answers
from gate.evaluation.graders import load_grader
from gate.evaluation.prompts import read_prompts
from tests.support import demo
from tests.support.server_process import KEY, Served

ROOT = demo.DEMO.parents[1]
HARNESS = demo.DEMO / "harness"
PROMPTS = demo.DEMO / "prompts" / "test.jsonl"
MODEL = "polylogit-demo"
BENCH = """
import argparse, sys
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
common = sys.argv[1:]
for backend, path in (("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")):
    own = ["--backend", backend, "--endpoint", path, "--result-filename", f"{backend}.json"]
    serve.main(parser.parse_args([*common, *own]))
"""
SECONDS = 200
Number = Annotated[int, Field(ge=0, le=99)]


def run(folder: Path, *arguments: str | Path) -> None:
    """Run Python with `arguments` at the repository's root, offline. Fails with its last words."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": KEY}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_benchmark_client_of_vllm(demo_server: Served, tmp_path: Path) -> None:
    run(
        tmp_path,
        *("-c", BENCH, "--base-url", demo_server.url, "--model", MODEL, "--tokenizer", demo.model("math")),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8", "--num-prompts", "6"),
        *("--ignore-eos", "--save-result", "--result-dir", tmp_path),
    )
    for backend in ("openai-chat", "openai"):
        result = json.loads((tmp_path / f"{backend}.json").read_text())
        assert (result["completed"], result["failed"], result["total_output_tokens"]) == (6, 0, 48)


# --- lm-evaluation-harness ---


def harness(folder: Path, task: str, model: str, arguments: str) -> dict[str, float]:
    """The metrics of one task, by name."""
    run(
        folder,
        *("-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--apply_chat_template"),
        *("--include_path", HARNESS, "--tasks", task, "--output_path", folder / "results.json"),
    )
    (file,) = folder.glob("results*.json")
    return dict(json.loads(file.read_text())["results"][task])


def test_the_generation_task_agrees_with_our_evaluation(demo_server: Served, tmp_path: Path) -> None:
    where = f"base_url={demo_server.url}/v1/chat/completions,model={MODEL},num_concurrent=16"
    found = harness(tmp_path, "polylogit_generation", "local-chat-completions", where)
    questions = read_prompts(PROMPTS)

    async def ask() -> Any:
        async with httpx.AsyncClient(
            base_url=f"{demo_server.url}/v1/", headers=demo_server.headers, timeout=60
        ) as client:
            return await answers(client, MODEL, questions, load_grader("exact"), max_tokens=24, concurrency=16)

    own = asyncio.run(ask())
    accuracy = sum(own.right) / len(own.right)
    assert len(own.right) == len(questions) == 400 and accuracy > 0.5
    assert found["exact_match,none"] == pytest.approx(accuracy)


def test_the_choice_task_agrees_with_prompt_logprobs(demo_server: Served, tmp_path: Path) -> None:
    """The same choices scored another way: as an assistant's message that is to be continued."""
    where = f"base_url={demo_server.url}/v1/completions,model={MODEL},tokenizer={demo.model('math')},num_concurrent=16"
    found = harness(tmp_path, "polylogit_choice", "local-completions", where)
    rows = choice_rows()
    with ThreadPoolExecutor(16) as pool:
        right = sum(pool.map(lambda row: best(demo_server, row) == row["right"], rows))
    assert len(rows) == 40 and right > 10
    assert found["acc,none"] == pytest.approx(right / len(rows))


def choice_rows() -> list[dict[str, Any]]:
    """What the task makes of the prompts."""
    module = runpy.run_path(str(HARNESS / "choices.py"))
    return list(module["choices"]([json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]))


def best(server: Served, row: dict[str, Any]) -> int:
    """The choice with the highest log-probability."""
    question = {"role": "user", "content": row["question"]}
    scores = [_logprob(server, question, choice) for choice in row["choices"]]
    return scores.index(max(scores))


def _logprob(server: Served, question: dict[str, str], choice: str) -> float:
    answer = server.chat(
        messages=[question, {"role": "assistant", "content": choice}],
        continue_final_message=True,
        prompt_logprobs=0,
        max_tokens=1,
    )
    entries = answer["prompt_logprobs"][-len(choice.encode()) :]  # a token is a byte here
    return sum(next(iter(entry.values()))["logprob"] for entry in entries)


# --- an agent ---


async def test_an_agent_calls_a_tool_and_answers(demo_server: Served) -> None:
    """The demo's experts know no tools: what can be asked is that they are made to call one and read its answer."""
    called: list[tuple[int, int]] = []

    @function_tool
    def add(first: Number, second: Number) -> str:
        """Add two numbers."""
        called.append((first, second))
        return str(first + second)

    async with demo_server.async_openai() as client:
        agent = Agent(
            name="calculator",
            tools=[add],
            model=OpenAIChatCompletionsModel(MODEL, client),
            model_settings=ModelSettings(
                tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=100
            ),
        )
        quiet = RunConfig(tracing_disabled=True)
        whole = await Runner.run(agent, "Add 27 and 58.", max_turns=2, run_config=quiet)
        streamed = Runner.run_streamed(agent, "Add 27 and 58.", max_turns=2, run_config=quiet)
        async for _ in streamed.stream_events():
            pass
    assert len(called) == 2 and called[0] == called[1]
    assert all(0 <= value <= 99 for value in called[0])
    kinds = [type(item).__name__ for item in whole.new_items]
    assert kinds == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]
    assert isinstance(whole.final_output, str) and whole.final_output == streamed.final_output
