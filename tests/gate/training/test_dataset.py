"""Records in memory: what the shards hold, and one line for what cannot be used."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from gate.training import dataset, records
from gate.training.records import MANIFEST, RecordError, shards
from tests.support.records import MANIFEST as MADE
from tests.support.records import response, written


def test_all_shards_are_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 1)
    written(tmp_path, range(4))
    assert len(shards(tmp_path)) == 4
    manifest, found = dataset.load(tmp_path, hidden=True)
    assert manifest == MADE
    assert found.prompts == ["p0", "p0", "p1", "p1"]
    assert found.rewards.tolist() == [0, 1, 0, 1]
    again = dataset.from_responses(20, [response(task) for task in range(4)])
    for name in ("topk_logprobs", "topk_ids", "rest", "tokens", "token_logprobs", "lengths", "rewards"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert all(map(torch.equal, found.hidden, again.hidden))


def test_hidden_states_are_read_only_when_wanted(tmp_path):
    written(tmp_path, [0])
    assert dataset.load(tmp_path, hidden=False)[1].hidden == []


def damaged(path, without="", header=None, **changes):
    """Other tensors, or one left out, under a header that fits them; or a header of one's own."""
    with records.open_shard(path) as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in (load_file(path) | changes).items() if name != without}
    save_file(tensors, path, metadata | {"digest": records.tensors_sha256(tensors)} if header is None else header)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (flip_a_bit, "damaged"),
        (lambda path: damaged(path, topk_ids=np.zeros((6, 2, 5), np.int32)), "topk_ids has shape"),
        (
            lambda path: damaged(path, lengths=np.array([6], np.int32), rewards=np.zeros(1, np.float32)),
            "2 prompts' ids",
        ),
        (lambda path: damaged(path, without="hidden.1"), r"has no hidden\.1"),
        (lambda path: damaged(path, without="tokens"), "not a shard of records"),
        (lambda path: damaged(path, header={}), "its header has no digest, ids, manifest"),
        (lambda path: path.unlink(), "no shards"),
        (lambda path: (path.parent / MANIFEST).write_text('{"format_version": 1}'), "manifest"),
    ],
)
def test_damage_is_one_line(tmp_path, harm, words):
    written(tmp_path, [0, 1])
    harm(shards(tmp_path)[0])
    with pytest.raises(RecordError, match=words) as caught:
        dataset.load(tmp_path, hidden=True)
    assert "\n" not in str(caught.value)


def test_without_hidden_states_there_are_none_to_read(tmp_path):
    import msgspec

    written(tmp_path, [], msgspec.structs.replace(MADE, hidden_sizes=[]))
    with pytest.raises(RecordError, match="without hidden states"):
        dataset.load(tmp_path, hidden=True)
