"""The experiment script: its steps name each other's files, and its tables come out of made-up answers."""

import json

from deploy.demo.experiment import FULL, Experiment, ExperimentOptions
from gate.evaluation.results import Answers, Results, save_results

DOMAINS = ["math", "mixed"] * 5


def experiment(tmp_path):
    places = {"work": tmp_path / "work", "report": tmp_path / "report", "experts": tmp_path / "experts"}
    options = ExperimentOptions(seed=7, base=tmp_path / "base", test=5, **places)
    return Experiment(options)


def asked(made, monkeypatch):
    """Runs every step but `tables` without its commands: {results file: the labels it was to hold}."""
    files = {}

    def evaluate(config, prompts, output, rows, gate=None):
        assert (made.work / f"{config}.yaml").is_file()
        files[output] = list(rows.values())

    monkeypatch.setattr(made, "evaluate", evaluate)
    monkeypatch.setattr(made, "command", lambda *_: None)
    (made.work / "done").mkdir(parents=True)
    for step in made.steps()[:-1]:
        step.run()
    return files


def test_tables_hold_every_row_that_was_asked_for(tmp_path, monkeypatch):
    made = experiment(tmp_path)
    files = asked(made, monkeypatch)
    files["routing"] = ["oracle routing", "learned routing"]
    for name, labels in files.items():
        models = {label: Answers(["?"] * 10, [int(label.startswith("gate"))] * 10) for label in labels}
        save_results(
            Results("p", "sha", [str(i) for i in range(10)], DOMAINS, "exact", models), made.results / f"{name}.json"
        )
    (made.work / "commands.txt").write_text("")
    (made.work / "times.json").write_text("{}")
    made.report.mkdir()
    made.write_tables()
    table = (made.report / "table.md").read_text()
    shown = {label for name, labels in files.items() if name != "train-experts" for label in labels}
    assert all(f"| {label} |" in table for label in shown if not label.endswith("responses"))
    assert f"**{FULL}** minus the best of math, text, chat, oracle routing" in table
    assert f"**{FULL}** minus the best of FusionRoute, its router alone" in table
    assert "1000 responses" in (made.report / "data-efficiency.md").read_text()
    assert "torch" in json.loads((made.report / "versions.json").read_text())
    assert {path.name for path in made.report.glob("*.png")} == {"table.png", "data-efficiency.png"}


def test_a_finished_step_is_not_run_again(tmp_path, monkeypatch):
    made, run = experiment(tmp_path), []
    monkeypatch.setattr(made, "command", lambda shown, *_: run.append(shown))
    monkeypatch.setattr(made, "steps", lambda: Experiment.steps(made)[:2])
    made.run([])
    made.run([])
    assert run == ["python -m deploy.demo.train.prompts", "polylogit"]
    made.run(["record"])
    assert run[2:] == ["polylogit"]
