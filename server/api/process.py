"""The api process: an HTTP server on a socket that the supervisor has bound, and the channel to the
coordinator.

It takes no signals: it ends when the coordinator sends `Stop`.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket

import uvloop

from server.api.app import create_app
from server.api.client import EngineClient
from server.api.http.server import http_server
from server.api.tracing import Tracing, close, tracer_provider
from server.config import Config
from server.wire.api import FromApi, ToApi
from server.wire.async_channel import AsyncChannel

# A body of a million small lists must not be walked again for every 700 of them.
_COLLECT = (50_000, 20, 20)


def run(config: Config, address: str, listener: socket.socket) -> None:
    """Serve `config` on `listener` until the coordinator at `address` says stop. Raises StartError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.set_threshold(*_COLLECT)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, address, listener))


async def serve(config: Config, address: str, listener: socket.socket) -> None:
    """As `run`, in the running event loop. Raises StartError."""
    # asyncio only does this for sockets that name their protocol; accepted ones inherit it
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    provider = tracer_provider(config)
    channel: AsyncChannel[ToApi, FromApi] = AsyncChannel(address, ToApi, bind=False)
    try:
        tracing = None if provider is None else Tracing(provider, config.expert_names)
        client = EngineClient(channel)
        server = http_server(create_app(config, client, tracing), config.http.write_seconds)
        running = asyncio.create_task(client.run())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        await running
    finally:
        channel.close()
        if provider is not None:
            close(provider)
