"""Asking a made-up endpoint: what is sent, graded and kept."""

import json

import httpx
import pytest

from gate.evaluation.endpoint import answers, collect_answers, labelled
from gate.evaluation.graders import Exact
from gate.evaluation.prompts import read_prompts
from gate.evaluation.results import Answers, EvaluationError, load_results, new_results
from tests.support.evaluations import ROWS, prompts_file
from tests.support.openai_endpoint import cards, endpoint


async def ask_all(tmp_path, handler, rows=ROWS):
    questions = read_prompts(prompts_file(tmp_path, rows))
    async with httpx.AsyncClient(base_url="http://test/v1/", transport=httpx.MockTransport(handler)) as client:
        return await answers(client, "gate", questions, Exact(), concurrency=1, max_tokens=9)


async def test_asks_greedily_and_grades_whole_answers(tmp_path):
    bodies = []

    def reply(request):
        bodies.append(json.loads(request.content))
        usage = {"completion_tokens": 3}
        return httpx.Response(200, json={"choices": [{"message": {"content": " 2\n"}}], "usage": usage})

    found = await ask_all(tmp_path, reply)
    assert (found.texts, found.right, found.tokens, found.served_by) == ([" 2\n"] * 2, [1, 0], 6, "gate")
    assert [body["messages"] for body in bodies] == [row["messages"] for row in ROWS]
    assert (bodies[0]["model"], bodies[0]["temperature"], bodies[0]["max_tokens"]) == ("gate", 0, 9)


async def test_an_answer_that_was_cut_is_wrong_whatever_it_says(tmp_path):
    def reply(request):
        return httpx.Response(200, json={"choices": [{"message": {"content": "2"}, "finish_reason": "length"}]})

    found = await ask_all(tmp_path, reply)
    assert (found.texts, found.right, found.cut) == (["2", "2"], [0, 0], 2)


async def test_a_rows_tools_are_shown_and_their_calls_are_text(tmp_path):
    """As in a recording, which grades what the model wrote."""
    bodies, tools = [], [{"type": "function", "function": {"name": "f"}}]

    def reply(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": "2"}}]})

    await ask_all(tmp_path, reply, [{**ROWS[0], "tools": tools}, ROWS[1]])
    assert (bodies[0]["tools"], bodies[0]["tool_choice"]) == (tools, "none")
    assert not bodies[1].keys() & {"tools", "tool_choice"}


async def evaluated(tmp_path, models, served, before=None):
    """The results of a whole evaluation of an endpoint, after some that were there `before`."""
    path = prompts_file(tmp_path)
    results = new_results(path, read_prompts(path), "exact")
    results.models = before or {}
    with endpoint(served, lambda body: "2") as url:
        await collect_answers(
            f"{url}/v1",
            models,
            read_prompts(path),
            Exact(),
            results,
            tmp_path / "r.json",
            concurrency=2,
            max_tokens=9,
        )
    return load_results(tmp_path / "r.json").models


async def test_all_is_asked_but_not_twice_under_two_names(tmp_path):
    """The bare name of a deployment is one of its policies: as a row beside it, it would be the best other row."""
    assert [*await evaluated(tmp_path, [], cards("demo", "demo:gate", "demo:math"))] == ["demo:gate", "demo:math"]
    elsewhere = cards("base", "adapter", owner="vllm")
    assert [*await evaluated(tmp_path, [], elsewhere)] == ["base", "adapter"]
    assert [*await evaluated(tmp_path, ["demo"], cards("demo", "demo:gate"))] == ["demo"]


async def test_a_label_stays_with_the_model_whose_answers_it_names(tmp_path):
    before = {"row": Answers(["?"] * 2, [0, 0], served_by="demo:math")}
    with pytest.raises(EvaluationError, match="'row' are of demo:math, not of demo:text"):
        await evaluated(tmp_path, ["demo:gate", "demo:text=row"], [], before)
    assert not (tmp_path / "r.json").exists()
    found = await evaluated(tmp_path, ["demo:math=row", "demo:text=other"], [], before)
    assert (found["row"].texts, found["other"].texts) == (["?"] * 2, ["2"] * 2)


async def test_a_refusal_is_one_line_with_the_servers_words(tmp_path):
    with pytest.raises(EvaluationError, match=r"gate, prompt m1: 404 .*no such model"):
        await ask_all(tmp_path, lambda request: httpx.Response(404, text="no such model"))


def test_labels():
    assert labelled(["demo:gate=the gate", "demo"]) == {"the gate": "demo:gate", "demo": "demo"}
    with pytest.raises(EvaluationError, match="two rows would be labelled 'demo'"):
        labelled(["demo", "demo:gate=demo"])
