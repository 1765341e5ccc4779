"""Results files, and the tables and plots of several."""

import pytest

from gate.evaluation.report import compare, join, markdown, plot, tabulate
from gate.evaluation.results import EvaluationError, load_results
from tests.support.evaluations import ROWS, results_file


def test_results_round_trip_and_refuse_garbage(tmp_path):
    path = results_file(tmp_path, "a.json", {"x": [1, 0]})
    assert load_results(path).models["x"].right == [1, 0]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(EvaluationError, match=r"a\.json"):
        load_results(path)


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
