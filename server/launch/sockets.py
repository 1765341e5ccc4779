"""What a deployment listens on: TCP ports for others, and a directory for the sockets that it keeps to itself."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from server.errors import StartError


@contextlib.contextmanager
def bound(what: str, host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket bound to `host`:`port`, not yet listening. Raises StartError that names `what` it is for."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise StartError(f"{what}: cannot listen on {host}:{port}: {error.strerror}") from None
        yield found


def http_url(host: str, port: int) -> str:
    """Where a server that listens there is reached."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for the sockets that only this user can enter; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="polylogit-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
