"""What all messages share. Everything that crosses a process is one of them, one small struct each.

Arrays travel as little-endian bytes with their dtype named where the field is documented; shapes follow from the row
count. Letters: B rows, E experts, K top-k, X exact ids, U candidates, d projected size.

Three conversations, each a pair of sockets (`server.wire.channel`):
    api         <-> coordinator   `server.wire.api`, with the counters of `server.wire.stats`
    coordinator <-> expert        `server.wire.expert`
    supervisor  <-> coordinator   `server.wire.supervisor`
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages: positional, tagged by class name."""


class Stop(Message, frozen=True, tag="Stop"):
    """Leave."""
