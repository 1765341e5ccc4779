"""The api process: an HTTP server on a socket that the supervisor has bound, and the channel to the
coordinator.

It takes no signals: it ends when the coordinator sends `Stop`.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys

import uvloop

from server.api.app import create_app
from server.api.client import EngineClient
from server.api.http import http_server
from server.config import Config
from server.errors import StartError
from server.messages import FromApi, ToApi
from server.transport import AsyncChannel

# A body of a million small lists must not be walked again for every 700 of them.
_COLLECT = (50_000, 20, 20)


def run(config: Config, address: str, listener: socket.socket) -> None:
    """Serve `config` on `listener` until the coordinator at `address` says stop. Exits with 1 and one line if
    it cannot."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.set_threshold(*_COLLECT)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config, address, listener))
    except StartError as error:
        sys.exit(f"polylogit: {error}")


async def serve(config: Config, address: str, listener: socket.socket) -> None:
    """As `run`, in the running event loop. Raises StartError."""
    # asyncio only does this for sockets that name their protocol; accepted ones inherit it
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel: AsyncChannel[ToApi, FromApi] = AsyncChannel(address, ToApi, bind=False)
    try:
        client = EngineClient(channel)
        server = http_server(create_app(config, client))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await client.run()
        finally:
            server.should_exit = True
            await serving
    finally:
        channel.close()
