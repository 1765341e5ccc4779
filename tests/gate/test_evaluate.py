"""The HTTP evaluation against a made-up endpoint."""

import json

import httpx

from gate.evaluate import Outcome, accuracy, evaluate, markdown, oracle, read_questions

ROWS = [
    {"id": "m1", "domain": "math", "messages": [{"role": "user", "content": "1+1"}], "answer": "2"},
    {"id": "t1", "domain": "text", "messages": [{"role": "user", "content": "Reverse ab."}], "answer": "ba"},
]


def questions(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return read_questions(path)


async def test_asks_greedily_and_scores_by_exact_match(tmp_path):
    bodies = []

    def answer(request):
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": " 2\n"}}]})

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(base_url="http://test/v1/", transport=transport) as client:
        outcomes = await evaluate(client, "gate", questions(tmp_path), concurrency=1, max_tokens=9)
    assert accuracy(outcomes) == {"math": 1.0, "text": 0.0, "all": 0.5}
    assert bodies[0]["model"] == "gate"
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0, 9)


def test_oracle_takes_any_right_answer(tmp_path):
    first, second = questions(tmp_path)
    math = [Outcome(first, "2"), Outcome(second, "ab")]
    text = [Outcome(first, "1"), Outcome(second, "ba")]
    assert accuracy(oracle([math, text]))["all"] == 1.0


def test_markdown():
    table = markdown({"uniform": {"math": 0.125, "all": 1.0}})
    assert table.splitlines() == [
        "| model | math | all |",
        "| --- | --- | --- |",
        "| uniform | 0.12 | 1.00 |",
    ]
