"""`polylogit train` without engines: from made-up records to a checkpoint; one line for what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from gate.contract import read_contract
from gate.training.records import FORMAT_VERSION, MANIFEST, Manifest, RecordWriter, Response, read_manifest, shards
from server.cli import main
from server.config import load_config
from server.training.recorder import fingerprints, hidden_sizes, vocabulary_of
from tests.support import demo

EXPERTS = ["math", "text"]
TOP_K = 8
SHORT = [{"role": "user", "content": "Hi"}]
LONG = {"id": "long", "messages": [{"role": "user", "content": "x" * 1500}], "answer": "b"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "polylogit.yaml")


def write_config(path: Path, **changes: Any) -> Path:
    data = demo.configuration(**{"experts": EXPERTS, **changes})
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture
def records(config: Path, tmp_path: Path) -> Path:
    return write_records(config, tmp_path / "records")


def write_records(config: Path, directory: Path, rewards: tuple[float, ...] = (0.0, 1.0)) -> Path:
    """Sixty responses of made-up experts; the rewards in turn."""
    loaded = load_config(config)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        experts=loaded.expert_names,
        models=fingerprints(loaded),
        vocabulary_hash=vocabulary_of(loaded),
        vocabulary_size=demo.VOCABULARY,
        top_k=TOP_K,
        hidden_sizes=hidden_sizes(loaded),
        prompts="00",
        grader="exact",
        sources=["math"],
        settings={},
    )
    writer = RecordWriter(directory, manifest)
    rng = np.random.default_rng(0)
    for task in range(60):
        writer.add(made_up(rng, task, rewards[task % len(rewards)]))
    writer.close()
    return directory


def made_up(rng: np.random.Generator, task: int, reward: float) -> Response:
    length = 4
    logits = np.sort(rng.normal(size=(length, 2, demo.VOCABULARY)), axis=2)[:, :, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    ids = np.argsort(rng.random((length, 2, demo.VOCABULARY)), axis=2)[:, :, :TOP_K].astype(np.int32)
    return Response(
        task=task,
        prompt=task // 2,
        prompt_id=f"p{task // 2}",
        source=0,
        temperature=1.0,
        reward=reward,
        tokens=ids[:, 1 if reward else 0, 0],
        topk_ids=ids,
        topk_logprobs=logprobs[:, :, :TOP_K].astype(np.float32),
        hidden=[rng.normal(size=(length, 128)).astype(np.float32) for _ in range(2)],
        token_logprobs=logprobs[:, :, 0].astype(np.float32),
    )


def train(config: Path, records: Path, *more: str) -> int:
    output = records.parent / "gate.pt"
    return main(["train", str(config), "--records", str(records), "--output", str(output), "--updates", "20", *more])


@pytest.mark.parametrize(
    ("more", "inputs", "state"),
    [
        ((), ["topk", "hidden"], 0),
        (("--inputs", "topk", "--space", "prob"), ["topk"], 0),
        (("--inputs", "hidden", "--state-size", "5", "--validation", "0", "--responses", "40"), ["hidden"], 5),
    ],
)
def test_a_gate_of_each_family(
    config: Path,
    records: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    inputs: list[str],
    state: int,
) -> None:
    assert train(config, records, *more) == 0
    contract = read_contract(records.parent / "gate.pt")
    assert (contract.inputs, contract.state_size, contract.experts) == (inputs, state, EXPERTS)
    printed = capsys.readouterr()
    assert "parameters" in printed.out
    assert "us a forward at B=32" in printed.out
    assert "20 updates, " in printed.err and " ms each, on cpu" in printed.err
    folder = records.parent / "gate.training"
    assert sorted(path.name for path in folder.iterdir()) == ["curves.csv", "curves.png"]


def test_the_same_seed_gives_the_same_gate(config: Path, records: Path) -> None:
    import torch

    from gate import checkpoint

    weights = []
    for seed in ("0", "0", "1"):
        assert train(config, records, "--seed", seed, "--state-size", "3") == 0
        module = checkpoint.load(records.parent / "gate.pt").module
        weights.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def interrupt(patched: pytest.MonkeyPatch) -> None:
    """As Ctrl+C just after the first measurement."""
    from server.training import log as training_log

    save = training_log.TrainingLog.save

    def interrupted(self: training_log.TrainingLog) -> None:
        save(self)
        raise KeyboardInterrupt

    patched.setattr(training_log.TrainingLog, "save", interrupted)


def test_an_interrupted_training_goes_on_and_another_one_does_not(
    config: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched)
        assert train(config, records, "--updates", "100") == 130
    assert not (records.parent / "gate.pt").exists()
    capsys.readouterr()
    assert train(config, records, "--updates", "100", "--rate", "0.1") == 1
    assert "is of another training: rate was 0.003, is now 0.1" in capsys.readouterr().err
    assert train(config, records, "--updates", "100") == 0
    assert "going on at broadcast 50" in capsys.readouterr().err
    steps = [line.split(",")[1] for line in (records.parent / "gate.training" / "curves.csv").read_text().splitlines()]
    assert steps == ["step", "50", "100"]


def test_other_prompts_in_the_same_file_are_another_training(
    config: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = records.parent / "prompts.jsonl"
    prompts.write_text('{"id": "a", "messages": [{"role": "user", "content": "1"}], "answer": "1"}\n')
    refined = ("--updates", "100", "--refine-steps", "1", "--prompts", str(prompts), "--grader", "exact")
    interrupt(monkeypatch)
    assert train(config, records, *refined) == 130
    prompts.write_text(prompts.read_text().replace('"1"', '"2"'))
    capsys.readouterr()
    assert train(config, records, *refined) == 1
    assert "is of another training: prompts was " in capsys.readouterr().err


def edit_manifest(records: Path, **changes: Any) -> None:
    manifest = msgspec.structs.replace(read_manifest(records), **changes)
    (records / MANIFEST).write_bytes(msgspec.json.encode(manifest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"experts": ["math", "chat"]},
            "experts in the records: ['math', 'chat'], in the deployment: ['math', 'text']",
        ),
        ({"vocabulary_hash": "ab" * 32}, "the vocabulary in the records: abababababab"),
        ({"models": ["00", "11"]}, "expert math has changed since the recording"),
        ({"hidden_sizes": []}, "recorded without hidden states"),
        ({"format_version": 3}, "format version 3, this program reads 4; record again"),
    ],
)
def test_records_of_something_else(
    config: Path, records: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    edit_manifest(records, **changes)
    assert train(config, records) == 1
    assert_one_line(capsys, words)


def assert_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_truncated_shard(config: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = shards(records)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert train(config, records) == 1
    assert_one_line(capsys, "shard-00000.safetensors: truncated")


@pytest.mark.parametrize(("rewards", "word"), [((0.0,), "right"), ((1.0,), "wrong")])
def test_nothing_to_learn_from(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rewards: tuple[float, ...], word: str
) -> None:
    assert train(config, write_records(config, tmp_path / "alike", rewards)) == 1
    assert_one_line(capsys, f"responses to train on is {word}: nothing to learn from")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--inputs", "logits"), "--inputs: 'logits' is not topk, hidden, or topk,hidden"),
        (("--refine-steps", "5"), "--refine-steps needs --prompts and --grader"),
        (("--grader", "exact"), "are for --refine-steps"),
        (("--responses", "100"), "100 responses are wanted, the records have 60"),
        (("--device", "nonsense"), "--device nonsense"),
    ],
)
def test_arguments_that_cannot_be(
    config: Path, records: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    assert train(config, records, *more) == 1
    assert_one_line(capsys, words)


def test_no_records(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, tmp_path / "absent") == 1
    assert_one_line(capsys, "no records there")


def record(config: Path, prompts: Path, *more: str) -> int:
    output = prompts.parent / "records"
    return main(["record", str(config), "--prompts", str(prompts), "--output", str(output), *more])


@pytest.mark.parametrize(
    ("lines", "more", "words"),
    [
        ("", (), "no lines"),
        ("{", (), "prompts.jsonl:1: not JSON"),
        ("[]", (), "prompts.jsonl:1: not a JSON object"),
        ('{"id": "a"}', (), 'prompts.jsonl:1: a prompt needs "messages" (a list)'),
        (
            '{"id": "a", "messages": []}\n{"id": "a", "messages": []}',
            (),
            "prompts.jsonl:2: the id 'a' was there before",
        ),
        ('{"id": "a", "messages": []}', (), "prompt 'a' has no \"answer\""),
        ('{"id": "a", "messages": [], "answer": "b"}', (), "prompt 'a': messages: List should have at least 1 item"),
        (json.dumps(LONG), (), "prompt 'long': 1504 tokens and a response of 1; expert math has room for 1024"),
        (
            json.dumps({**LONG, "messages": SHORT, "answer": "x" * 1100}),
            ("--answers",),
            "and a response of 1101; expert math",
        ),
        ('{"id": "a", "messages": [], "answer": "b"}', ("--policies", "nobody"), "'nobody' is not one of math, text"),
        ('{"id": "a", "messages": [], "answer": "b"}', ("--gate", "absent.pt"), "no gate checkpoint at absent.pt"),
        ('{"id": "a", "messages": [], "answer": "b"}', ("--responses", "absent"), "absent: cannot be read"),
        ('{"id": "a", "messages": [], "answer": "b"}', ("--grader", "exakt"), "--grader exakt"),
    ],
)
def test_recordings_that_cannot_be(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, more: tuple[str, ...], words: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines)
    assert record(config, path, "--grader", "exact", *more) == 1
    assert_one_line(capsys, words)
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(("name", "more"), [("answer", ()), ("response", ("--answers",)), ("gate", ("--gate", "g.pt"))])
def test_an_expert_with_the_name_of_other_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, more: tuple[str, ...]
) -> None:
    """It would be taken for these, and never be drawn."""
    data = demo.configuration(experts=EXPERTS)
    data["experts"][1]["name"] = name
    config, path = tmp_path / "named.yaml", tmp_path / "prompts.jsonl"
    config.write_text(yaml.safe_dump(data))
    path.write_text(json.dumps({"id": "a", "messages": SHORT, "answer": "b"}))
    assert record(config, path, "--grader", "exact", *more) == 1
    assert_one_line(capsys, f"{name!r} (an expert or policy) is what other responses of a recording are called")


def test_a_fingerprint_sees_weights_and_texts(config: Path, tmp_path: Path) -> None:
    first = fingerprints(load_config(config))
    assert first == fingerprints(load_config(write_config(tmp_path / "same.yaml")))
    shutil.copytree(demo.model("math"), tmp_path / "math")
    [weights] = (tmp_path / "math").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    data_changed = write_config(tmp_path / "b.yaml", only={"math": {"model": str(tmp_path / "math")}})
    prompt_changed = write_config(tmp_path / "c.yaml", only={"math": {"system_prompt": "Be brief."}})
    for path in (data_changed, prompt_changed):
        other = fingerprints(load_config(path))
        assert other[0] != first[0]
        assert other[1] == first[1]
