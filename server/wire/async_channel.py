"""The same channel as `server.wire.channel`'s, for an asyncio process: the api."""

from __future__ import annotations

import asyncio
from typing import Generic

import msgspec

from server.wire.channel import CHUNK_BYTES, RETRY_SECONDS, Incoming, Outgoing
from server.wire.framing import FrameParser, framed

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class AsyncChannel(Generic[Incoming, Outgoing]):
    """One task may send while another receives. `incoming` is the union of message types that this side accepts."""

    def __init__(self, address: str, incoming: object, *, bind: bool) -> None:
        self._address = address
        self._bind = bind
        self._connecting = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._streams: _Streams | None = None
        self._frames = FrameParser()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)

    async def send(self, message: Outgoing) -> None:
        """Raises ConnectionError if the peer has gone."""
        _, writer = await self._connected()
        writer.write(framed(self._encoder.encode(message)))
        await writer.drain()

    async def receive(self) -> Incoming:
        """The next message. Raises asyncio.IncompleteReadError if the peer has gone."""
        reader, _ = await self._connected()
        while (frame := self._frames.pop()) is None:
            if not (data := await reader.read(CHUNK_BYTES)):
                raise asyncio.IncompleteReadError(b"", self._frames.missing())
            self._frames.feed(data)
        return self._decoder.decode(frame)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        if self._server is not None:
            self._server.close()

    async def _connected(self) -> _Streams:
        async with self._connecting:
            if self._streams is None:
                self._streams = await (self._accept() if self._bind else self._reach())
            return self._streams

    async def _accept(self) -> _Streams:
        arrived: asyncio.Future[_Streams] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            arrived.set_result((reader, writer))

        self._server = await asyncio.start_unix_server(connected, self._address, limit=CHUNK_BYTES)
        return await arrived

    async def _reach(self) -> _Streams:
        while True:
            try:
                return await asyncio.open_unix_connection(self._address, limit=CHUNK_BYTES)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(RETRY_SECONDS)
