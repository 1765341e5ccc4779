"""Digests, and files that are there whole or not at all."""

import os

import pytest

from gate.files import sha256_file, sha256_parts, write_whole


def test_sha256_file(tmp_path):
    path = tmp_path / "empty"
    path.write_bytes(b"")
    assert sha256_file(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_borders_between_parts_count():
    assert sha256_parts([b"ab", b"c"]) != sha256_parts([b"a", b"bc"]) != sha256_parts([b"abc"])


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file.json"
    write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
