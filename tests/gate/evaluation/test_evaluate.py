"""The HTTP evaluation against a made-up endpoint, its files, intervals and tables."""

import json

import httpx
import numpy as np
import pytest
from scipy import stats

from gate.evaluation.bootstrap import Bootstrap
from gate.evaluation.endpoint import answers, collect_answers, labelled
from gate.evaluation.graders import Exact
from gate.evaluation.prompts import PromptsError, read_prompts
from gate.evaluation.report import compare, join, markdown, plot, tabulate
from gate.evaluation.results import Answers, EvaluationError, load_results, new_results, save_results
from tests.support.openai_endpoint import cards, endpoint

ROWS = [
    {"id": "m1", "domain": "math", "messages": [{"role": "user", "content": "1+1"}], "answer": "2"},
    {"id": "t1", "domain": "text", "messages": [{"role": "user", "content": "Reverse ab."}], "answer": "ba"},
]


def prompts_file(tmp_path, rows=ROWS):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def results_file(tmp_path, name, models, rows=ROWS):
    path = prompts_file(tmp_path, rows)
    results = new_results(path, read_prompts(path), "exact")
    results.models = {label: Answers(["?"] * len(right), right) for label, right in models.items()}
    save_results(results, tmp_path / name)
    return tmp_path / name


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


@pytest.mark.parametrize("text", ["{", "[]", '{"answer": "2"}'])
def test_a_bad_prompt_is_named_by_its_line(tmp_path, text):
    path = prompts_file(tmp_path)
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(PromptsError, match=r"test.jsonl:3"):
        read_prompts(path)


def test_one_reader_for_recording_and_evaluation(tmp_path):
    """Blank lines, line separators inside of a text, and ids that come twice."""
    path = prompts_file(tmp_path)
    odd = {**ROWS[0], "id": "o", "messages": [{"role": "user", "content": "a\u2028b\x85c"}]}
    path.write_text(f"\n{path.read_text()}\n{json.dumps(odd, ensure_ascii=False)}\n\n", encoding="utf-8")
    assert [question.row for question in read_prompts(path)] == [*ROWS, odd]
    path.write_text(f"\n{json.dumps(odd)}\n\n{json.dumps(odd)}\n")
    with pytest.raises(PromptsError, match=r"test\.jsonl:4: the id 'o' was there before"):
        read_prompts(path)


def test_ids_and_domains_may_be_numbers_or_left_out(tmp_path):
    rows = [{"messages": []}, {"id": 7, "domain": 3, "messages": []}, {"id": None, "messages": []}]
    found = read_prompts(prompts_file(tmp_path, rows))
    assert [(each.id, each.domain) for each in found] == [("0", "all prompts"), ("7", "3"), ("2", "all prompts")]
    assert [each.row for each in found] == rows
    with pytest.raises(PromptsError, match="'7' was there before"):
        read_prompts(prompts_file(tmp_path, [*rows, {"id": "7", "messages": []}]))


def test_labels():
    assert labelled(["demo:gate=the gate", "demo"]) == {"the gate": "demo:gate", "demo": "demo"}
    with pytest.raises(EvaluationError, match="two rows would be labelled 'demo'"):
        labelled(["demo", "demo:gate=demo"])


def test_results_round_trip_and_refuse_garbage(tmp_path):
    path = results_file(tmp_path, "a.json", {"x": [1, 0]})
    assert load_results(path).models["x"].right == [1, 0]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(EvaluationError, match=r"a\.json"):
        load_results(path)


def test_interval_agrees_with_the_binomial():
    """The bootstrap of a share is binomial resampling: its quantiles are those of Binomial(n, p) / n."""
    right = [1] * 150 + [0] * 50
    found = Bootstrap(["d"] * 200).accuracy(right)["d"]
    draws = np.quantile(np.random.default_rng(1).binomial(200, 0.75, 200_000) / 200, [0.025, 0.975])
    assert found.mean == 0.75
    assert (found.low, found.high) == pytest.approx(tuple(draws), abs=0.0051)


def test_all_is_resampled_within_domains():
    """One domain all right, the other all wrong: their sizes were chosen, so the mean over both cannot vary."""
    found = Bootstrap(["a"] * 10 + ["b"] * 10).accuracy([1] * 10 + [0] * 10)["all"]
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


def test_differences_are_paired():
    """Two rows that are right on the same half, but for one prompt, differ little, however wide their own intervals."""
    half = [0, 1] * 20
    bootstrap = Bootstrap(["d"] * 40)
    assert bootstrap.accuracy(half)["d"].high > 0.6
    close = bootstrap.difference(half, [0, 0, *half[2:]])["d"]
    assert (close.low, close.mean, close.high) == (0, 1 / 40, pytest.approx(3 / 40))


def test_where_all_agree_the_interval_is_exact():
    """At a share of `low`, a hundred right answers in a row have a chance of 2.5%."""
    bootstrap = Bootstrap(["d"] * 100)
    right, wrong = bootstrap.accuracy([1] * 100)["d"], bootstrap.accuracy([0] * 100)["d"]
    assert right.low**100 == pytest.approx(0.025)
    assert (right.high, wrong.low, wrong.high) == (1, 0, pytest.approx(1 - right.low))


@pytest.mark.parametrize(("right", "other"), [(1, 0), (0, 0), (1, 1), (0, 1)])
def test_where_all_pairs_differ_alike_the_interval_is_exact(right, other):
    """A mean at the end of the interval leaves each pair its difference with a chance of which a hundred in a row have
    2.5%. The other differences lie as far away as they can: -1, or 1, or either."""
    found = Bootstrap(["d"] * 100).difference([right] * 100, [other] * 100)["d"]
    difference, chance = right - other, 0.025 ** (1 / 100)
    assert found.mean == difference
    assert found.low == pytest.approx(chance * difference - (1 - chance))
    assert found.high == pytest.approx(chance * difference + (1 - chance))


def test_intervals_are_those_of_scipy():
    """Each domain resampled by itself, and the mean of all; the ends move by the noise of 10,000 resamples."""
    rng = np.random.default_rng(0)
    domains, right = ["a"] * 40 + ["b"] * 60, (rng.random(100) < np.repeat([0.3, 0.8], [40, 60])).astype(int)
    found = Bootstrap(domains).accuracy(right)
    parts = {"a": (right[:40],), "b": (right[40:],), "all": (right[:40], right[40:])}
    for name, samples in parts.items():

        def mean(*resampled, axis=-1):
            return sum(each.sum(axis=axis) for each in resampled) / sum(each.shape[axis] for each in resampled)

        expected = stats.bootstrap(samples, mean, n_resamples=10_000, method="percentile", rng=rng).confidence_interval
        assert found[name].mean == pytest.approx(mean(*samples))
        assert (found[name].low, found[name].high) == pytest.approx(tuple(expected), abs=0.0251)


def test_join_refuses_other_prompts_and_repeated_rows(tmp_path):
    first = results_file(tmp_path, "a.json", {"x": [1, 0]})
    other = results_file(tmp_path, "b.json", {"y": [1]}, rows=ROWS[:1])
    with pytest.raises(EvaluationError, match=r"b\.json: other prompts"):
        join([first, other])
    again = results_file(tmp_path, "c.json", {"x": [0, 0]})
    with pytest.raises(EvaluationError, match=r"c\.json: 'x'"):
        join([first, again])


def test_table_and_comparison(tmp_path):
    rows = [{**ROWS[i % 2], "id": str(i)} for i in range(40)]
    files = [
        results_file(tmp_path, "a.json", {"math": [1, 0] * 20, "text": [0, 1] * 20}, rows),
        results_file(tmp_path, "b.json", {"gate": [1] * 40, r"$\odd$": [0] * 40}, rows),
    ]
    table = tabulate(join(files))
    comparison = compare(table, "gate")
    assert comparison.best["math"] == "math"
    assert comparison.best["text"] == "text"
    assert comparison.difference["all"].mean == 0.5
    assert (comparison.apart["math"], comparison.apart["all"]) == (False, True)
    text = markdown(table, [comparison])
    assert "or all paired differences are equal." in text
    assert "| gate | 1.000 [0.83, 1.00] | 1.000 [0.83, 1.00] | 1.000 [0.91, 1.00] |" in text
    assert "| all | math | +0.500 [+0.50, +0.50] | yes |" in text
    with pytest.raises(EvaluationError, match="no row is named 'gat'"):
        compare(table, "gat")
    plot(table, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
