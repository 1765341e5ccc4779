"""What counting finds in raw JSON against what is there once it is parsed."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from server.text.json_size import MAX_LEVELS, MAX_STRINGS, too_deep, too_much


def random_value(dice: random.Random, depth: int) -> Any:
    kind = dice.randrange(4 if depth else 2)
    if kind == 0:
        return dice.choice([0, None, True, 1.5])
    if kind == 1:
        return "".join(dice.choices('[]{}"\\é,: ', k=dice.randrange(8)))
    items = [random_value(dice, depth - 1) for _ in range(dice.randrange(5))]
    return items if kind == 2 else {f"{number}[{{": item for number, item in enumerate(items)}


def containers(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + sum(map(containers, value.values() if isinstance(value, dict) else value))


def levels(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(levels, value.values() if isinstance(value, dict) else value), default=0)


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("escaped", [True, False])
def test_brackets_in_strings_do_not_count(seed: int, escaped: bool) -> None:
    value = random_value(random.Random(seed), 5)
    raw, count = json.dumps(value, ensure_ascii=escaped).encode(), containers(value)
    assert too_much(raw, count) is None
    if count:
        assert too_much(raw, count - 1) == f"more than {count - 1} arrays and objects"


def test_strings() -> None:
    raw = b"[" + b",".join([b'"\\"["'] * MAX_STRINGS) + b"]"
    assert too_much(raw, 1) is None
    assert too_much(raw[:-1] + b',""]', 1) == f"more than {MAX_STRINGS} strings"


@pytest.mark.parametrize("seed", range(50))
def test_depth(seed: int) -> None:
    value: Any = [random_value(random.Random(seed), 5)]
    while levels(value) < MAX_LEVELS:
        assert too_deep(value) is None
        value = [value] if seed % 2 else {"x": value}
    assert too_deep(value) is None
    assert too_deep([value]) == f"more than {MAX_LEVELS} levels of nesting"
