"""Writes the demo's prompt files: `python -m deploy.demo.train.prompts`.

`prompts/train.jsonl` is what the gate is trained on, `prompts/test.jsonl` the held-out evaluation: its operand
pairs, words to transform and (fact, phrasing) pairs occur neither in the first nor in any expert's data. Gates were
chosen on `prompts/validation.jsonl`: another sample from the training side, never the test side, without the prompts of
training. Those called `fresh` ask for facts in phrasings that no expert was trained on and the tests do not have.
`--seed` samples other prompts; the two sides are the same for every seed.
"""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from deploy.demo.train import tasks
from gate.options import Output, run_module, whole

FOLDER = Path("deploy/demo/prompts")
TRAIN_COUNTS = {"math": 500, "text": 600, "chat": 300, "fresh": 200, "mixed": 1600}
VALIDATION_COUNTS = {"math": 250, "text": 250, "fresh": 150, "mixed": 250}
TEST_COUNT = 100
SYSTEM_PROBABILITY = 0.2
EARLIER_PROBABILITY = 0.15


def opening(rng: random.Random) -> list[dict[str, str]]:
    """What precedes a training prompt: sometimes a system message, sometimes an earlier turn."""
    messages = []
    if rng.random() < SYSTEM_PROBABILITY:
        messages.append({"role": "system", "content": tasks.system_prompt(rng)})
    if rng.random() < EARLIER_PROBABILITY:
        example = tasks.MAKERS[rng.choice(tasks.DOMAINS)](rng, False)
        messages.append({"role": "user", "content": example.prompt})
        messages.append({"role": "assistant", "content": example.answer()})
    return messages


def distinct(make: Callable[[], tasks.Example], count: int, taken: set[str]) -> list[tasks.Example]:
    """Examples with distinct prompts, none of them `taken`: `count`, or as many as 20 tries for each find."""
    chosen: dict[str, tasks.Example] = {}
    for _ in range(20 * count):
        example = make()
        if example.prompt not in taken:
            chosen.setdefault(example.prompt, example)
        if len(chosen) == count:
            break
    return list(chosen.values())


def rows(file: str, counts: dict[str, int], seed: int, taken: set[str]) -> list[dict[str, object]]:
    """One row per prompt, none of them `taken`; test prompts stand alone, the others sometimes follow something."""
    rng = random.Random(seed)
    test = file == "test"
    makers: dict[str, Callable[[], tasks.Example]] = {
        **{domain: functools.partial(make, rng, test) for domain, make in tasks.MAKERS.items()},
        "fresh": functools.partial(tasks.fresh_fact_example, rng, file == "validation"),
    }
    found: list[dict[str, object]] = []
    for kind, count in counts.items():
        for number, example in enumerate(distinct(makers[kind], count, taken)):
            messages = [*([] if test else opening(rng)), {"role": "user", "content": example.prompt}]
            row = {"domain": example.domain, "messages": messages, "answer": example.answer()}
            found.append({"id": f"{kind}-{number:04d}", **row})
            taken.add(example.prompt)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsOptions:
    """Of `python -m deploy.demo.train.prompts`."""

    seed: int = 0
    """Another one makes other prompts."""
    output: Annotated[Path, Output(folder=True)] = FOLDER
    """The files go into this."""
    test: Annotated[int, whole(0)] = TEST_COUNT
    """Test prompts a domain, where there are as many."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m deploy.demo.train.prompts", __doc__, PromptsOptions, run, arguments)


def run(options: PromptsOptions) -> None:
    """Run the command."""
    options.output.mkdir(parents=True, exist_ok=True)
    files = (
        ("train", TRAIN_COUNTS, 11),
        ("validation", VALIDATION_COUNTS, 13),
        ("test", dict.fromkeys(tasks.DOMAINS, options.test), 12),
    )
    taken: set[str] = set()
    for name, counts, base in files:
        seed = base + 1000 * options.seed
        found = rows(name, counts, seed, taken)
        if name != "test":
            random.Random(seed).shuffle(found)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(found)} prompts")


if __name__ == "__main__":
    main()
