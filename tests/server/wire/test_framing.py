"""Frames, however the bytes of a stream come."""

from __future__ import annotations

import struct

import pytest

from server.wire.framing import FrameError, FrameParser, framed

FRAMES = [b"", b"one", b"x" * 1000, b"\x00\x00"]


@pytest.mark.parametrize("step", [1, 3, 4, 5, 999, 10_000])
def test_frames_are_the_same_however_they_are_cut(step):
    stream = b"".join(framed(frame) for frame in FRAMES)
    parser, found = FrameParser(), []
    for start in range(0, len(stream), step):
        parser.feed(stream[start : start + step])
        while (frame := parser.pop()) is not None:
            found.append(frame)
    assert found == FRAMES


def test_a_reader_that_takes_what_is_missing_reads_nothing_of_the_next_frame():
    stream = framed(b"abc") + framed(b"next")
    parser, taken = FrameParser(), 0
    while parser.pop() is None:
        size = parser.missing()
        parser.feed(stream[taken : taken + size])
        taken += size
    assert taken == len(framed(b"abc"))


def test_a_frame_that_is_too_long_is_refused_before_it_has_arrived():
    parser = FrameParser(max_bytes=3)
    parser.feed(framed(b"abc") + struct.pack("<I", 4))
    assert parser.pop() == b"abc"
    with pytest.raises(FrameError, match="a frame of 4 bytes, at most 3 are accepted"):
        parser.pop()
    with pytest.raises(FrameError):
        parser.missing()


def test_half_a_frame_can_be_forgotten():
    parser = FrameParser()
    parser.feed(framed(b"abc")[:-1])
    assert parser.pop() is None
    parser.clear()
    parser.feed(framed(b"d"))
    assert parser.pop() == b"d"
