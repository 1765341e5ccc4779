"""A small prompts file, and results files over it."""

import json

from gate.evaluation.prompts import read_prompts
from gate.evaluation.results import Answers, new_results, save_results

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
