"""What `polylogit evaluate` goes on with, and what it refuses."""

import pytest

from gate.evaluate import new_results, read_questions, save_results
from server.cli import main


@pytest.mark.parametrize(
    ("more", "named"), [(["--max-tokens", "9"], "max_tokens"), (["--gate", "other.pt"], "gate")], ids=["length", "gate"]
)
def test_answers_of_other_settings_are_not_taken_up(tmp_path, monkeypatch, capsys, more, named):
    """Else the table would show the old gate's answers under the new one's name."""
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", "other.pt"):
        (tmp_path / name).write_text(name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "1", "domain": "d", "messages": [{"role": "user", "content": "?"}], "answer": "!"}\n')
    results = new_results(prompts, read_questions(prompts), "exact")
    results.about = {"settings": {"max_tokens": 256, "config": None, "gate": None}}
    save_results(results, tmp_path / "results.json")
    asked = ["evaluate", "config.yaml", "--prompts", "prompts.jsonl", "--output", "results.json", *more]
    assert main(asked) == 1
    assert "answers with another" in (error := capsys.readouterr().err) and named in error
