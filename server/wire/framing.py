"""Messages on a stream of bytes: a length (uint32, little-endian), then that many bytes. The one definition of it, for
every socket that the project opens itself.

Knows nothing of sockets: bytes come in as they come, whole frames come out.
"""

from __future__ import annotations

import struct

_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """The peer does not send frames, or sends longer ones than were agreed."""


def framed(data: bytes) -> bytes:
    """`data` as one frame."""
    return _LENGTH.pack(len(data)) + data


class FrameParser:
    """Puts the frames of one stream together."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """`max_bytes`: the longest frame that is accepted; None for any."""
        self._max_bytes = max_bytes
        self._received = bytearray()

    def feed(self, data: bytes) -> None:
        """Take in what has arrived."""
        self._received += data

    def pop(self) -> bytes | None:
        """The next frame's content, None while it has not all arrived. Raises FrameError."""
        length = self._length()
        if length is None or len(self._received) < (end := _LENGTH.size + length):
            return None
        frame = bytes(memoryview(self._received)[_LENGTH.size : end])
        del self._received[:end]
        return frame

    def missing(self) -> int:
        """How many bytes may be read without reading past the next frame; 0 when it is all there. Raises FrameError."""
        length = self._length()
        return (_LENGTH.size if length is None else _LENGTH.size + length) - len(self._received)

    def clear(self) -> None:
        """Forget a frame that has not all arrived."""
        self._received.clear()

    def _length(self) -> int | None:
        if len(self._received) < _LENGTH.size:
            return None
        length = int(_LENGTH.unpack_from(self._received)[0])
        if self._max_bytes is not None and length > self._max_bytes:
            raise FrameError(f"a frame of {length} bytes, at most {self._max_bytes} are accepted")
        return length
