"""Prompts files: what may be left out, and faults named by their line."""

import json

import pytest

from gate.evaluation.prompts import PromptsError, read_prompts
from tests.support.evaluations import ROWS, prompts_file


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
