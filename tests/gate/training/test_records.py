"""Records on disk: what is written comes back, interruptions lose nothing, and damage is named."""

import json
import shutil

import msgspec
import numpy as np
import pytest

from gate.training import records
from gate.training.dataset import load
from gate.training.records import RecordError, RecordWriter, difference, read_manifest, shards
from tests.support.records import MANIFEST, response, written


def test_round_trip(tmp_path):
    written(tmp_path, [0, 1, 2])
    assert read_manifest(tmp_path) == MANIFEST
    [path] = shards(tmp_path)
    with records.open_shard(path) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert found["lengths"].tolist() == [3, 3, 3]
    assert found["rewards"].tolist() == [0, 1, 0]
    assert found["prompts"].tolist() == [0, 0, 1]
    assert json.loads(metadata["ids"]) == ["p0", "p0", "p1"]
    assert metadata["digest"] == records.tensors_sha256(found)
    np.testing.assert_array_equal(found["tokens"][3:6], response(1).tokens)
    np.testing.assert_array_equal(found["topk_ids"][3:6], response(1).topk_ids)
    np.testing.assert_allclose(found["topk_logprobs"][3:6], response(1).topk_logprobs, rtol=1e-3)
    np.testing.assert_allclose(found["hidden.1"][3:6], response(1).hidden[1], rtol=1e-3, atol=1e-4)


def test_shards_are_bounded_and_what_is_done_is_known_again(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_BYTES", 2 * response(0).nbytes)
    written(tmp_path, range(5))
    assert len(shards(tmp_path)) == 3
    writer = RecordWriter(tmp_path, MANIFEST)
    assert writer.done == set(range(5))
    writer.add(response(7))
    writer.close()
    assert len(shards(tmp_path)) == 4
    assert not list(tmp_path.glob("*.partial"))


def test_a_write_that_was_cut_leaves_what_was_there(tmp_path):
    written(tmp_path, [0])
    (tmp_path / "shard-00001.partial").write_bytes(b"half")
    writer = RecordWriter(tmp_path, MANIFEST)
    writer.close()
    assert writer.done == {0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": ["text", "math"]}, "experts was"),
        ({"top_k": 8}, "top_k was 4, is now 8"),
        ({"grader": "json"}, 'grader was "exact", is now "json"'),
        ({"settings": {"seed": 1, "temperature": 1.0}}, "settings.seed was 0, is now 1"),
        ({"settings": {"seed": 0}}, "settings.temperature was 1.0, is now null"),
    ],
)
def test_another_recording_is_refused_and_named(tmp_path, change, words):
    written(tmp_path, [0])
    other = msgspec.structs.replace(MANIFEST, **change)
    assert words in difference(MANIFEST, other)
    with pytest.raises(RecordError, match="another recording"):
        RecordWriter(tmp_path, other)
    assert read_manifest(tmp_path) == MANIFEST


def test_two_recordings_at_once_are_refused(tmp_path):
    writer = RecordWriter(tmp_path, MANIFEST)
    with pytest.raises(RecordError, match="another process"):
        RecordWriter(tmp_path, MANIFEST)
    writer.close()


def test_damage_is_named(tmp_path):
    written(tmp_path, [0, 1])
    [path] = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RecordError, match=r"shard-00000\.safetensors: truncated"):
        RecordWriter(tmp_path, MANIFEST)
    (tmp_path / records.MANIFEST).write_text("{")
    with pytest.raises(RecordError, match="manifest"):
        read_manifest(tmp_path)
    (tmp_path / records.MANIFEST).unlink()
    with pytest.raises(RecordError, match=r"no manifest\.json"):
        RecordWriter(tmp_path, MANIFEST)


def test_a_shard_of_another_recording_is_refused(tmp_path):
    """Of the same shapes, so that nothing else would tell."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    written(ours, [0, 1])
    written(theirs, [0, 1, 2], msgspec.structs.replace(MANIFEST, experts=["x", "y"]))
    shutil.copy(shards(theirs)[0], ours / "shard-00001.safetensors")
    for read in (lambda: load(ours, hidden=True), lambda: RecordWriter(ours, MANIFEST)):
        with pytest.raises(RecordError, match=r"shard-00001\.safetensors: was recorded under another manifest\.json"):
            read()


def test_no_records(tmp_path):
    with pytest.raises(RecordError, match="no records there"):
        read_manifest(tmp_path / "absent")
