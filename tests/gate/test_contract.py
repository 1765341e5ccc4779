"""The embedded contract: round trip, refusal of damaged files, and mismatches that name the field."""

import sys
import zipfile
from subprocess import run

import msgspec
import pytest
from tokenizers import Tokenizer, models

from gate.contract import (
    CheckpointError,
    Contract,
    decode_contract,
    encode_contract,
    mismatches,
    read_contract,
    vocabulary_hash,
)

CONTRACT = Contract(
    format_version=1,
    experts=["math", "text"],
    vocabulary_hash="ab" * 32,
    top_k=8,
    space="logprob",
    inputs=["topk", "hidden"],
    hidden_sizes=[16, 24],
    projected_size=4,
    state_size=0,
)
DEPLOYMENT = {
    "experts": ["math", "text"],
    "vocabulary_hash": "ab" * 32,
    "vocabulary_size": 8,
    "hidden_sizes": [16, 24],
}


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("gate/extra/contract.json", content)
    return path


def test_round_trip(tmp_path):
    assert decode_contract(encode_contract(CONTRACT).encode()) == CONTRACT
    assert read_contract(archive(tmp_path / "gate.pt", encode_contract(CONTRACT))) == CONTRACT


def test_a_gate_that_is_none_for_recording_says_what_it_always_said():
    """Checkpoints of before there was the field have none, and programs of then refuse fields that they do not know."""
    assert "recording" not in encode_contract(CONTRACT)
    recording = msgspec.structs.replace(CONTRACT, projected_size=24, recording=True)
    assert decode_contract(encode_contract(recording).encode()) == recording


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no gate checkpoint"):
        read_contract(tmp_path / "gate.pt")


def test_not_an_archive(tmp_path):
    path = tmp_path / "gate.pt"
    path.write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match="not a readable TorchScript archive"):
        read_contract(path)


def test_archive_without_contract(tmp_path):
    path = tmp_path / "gate.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("gate/data.pkl", b"")
    with pytest.raises(CheckpointError, match=r"no embedded contract\.json"):
        read_contract(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 2}, "format_version"),
        ({"experts": ["math", "math"]}, "experts"),
        ({"top_k": 0}, "top_k"),
        ({"inputs": []}, "inputs"),
        ({"hidden_sizes": [16]}, "hidden_sizes"),
        ({"projected_size": 0}, "projected_size"),
        ({"state_size": -1}, "state_size"),
        ({"space": "logits"}, "space"),
        ({"surprise": 1}, "surprise"),
        ({"recording": True}, "recording gate must project to the widest"),
    ],
)
def test_contradictory_contracts_are_refused(tmp_path, change, named):
    fields = {**msgspec.to_builtins(CONTRACT), **change}
    with pytest.raises(CheckpointError, match=named):
        read_contract(archive(tmp_path / "gate.pt", msgspec.json.encode(fields)))


def test_no_mismatch():
    assert mismatches(CONTRACT, **DEPLOYMENT) == []
    assert mismatches(CONTRACT, **{**DEPLOYMENT, "hidden_sizes": None}) == []


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("experts", ["text", "math"]),
        ("vocabulary_hash", "cd" * 32),
        ("hidden_sizes", [16, 32]),
    ],
)
def test_mismatches_name_the_field_and_both_values(field, found):
    [message] = mismatches(CONTRACT, **{**DEPLOYMENT, field: found})
    assert message.startswith(f"{field}:")
    assert str(getattr(CONTRACT, field)) in message
    assert str(found) in message


def test_a_gate_that_reads_more_than_the_vocabulary_does_not_fit():
    [message] = mismatches(CONTRACT, **{**DEPLOYMENT, "vocabulary_size": 7})
    assert message == "top_k: the gate reads 8 tokens of each expert, which has 7"


def test_hidden_sizes_are_not_compared_for_a_gate_without_hidden_states():
    gate = msgspec.structs.replace(CONTRACT, inputs=["topk"], hidden_sizes=[], projected_size=0)
    assert mismatches(gate, **DEPLOYMENT) == []


def test_vocabulary_hash_sees_ids_and_added_tokens(tmp_path):
    def saved(name, vocabulary, added):
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.add_special_tokens(added)
        tokenizer.save(str(tmp_path / name))
        return vocabulary_hash(tmp_path / name)

    first = saved("a.json", {"a": 0, "b": 1}, ["<|end|>"])
    assert first == saved("b.json", {"b": 1, "a": 0}, ["<|end|>"])
    assert first != saved("c.json", {"a": 1, "b": 0}, ["<|end|>"])
    assert first != saved("d.json", {"a": 0, "b": 1}, ["<|stop|>"])


def test_importing_the_contract_does_not_import_torch():
    code = "import sys, gate.contract; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
