"""Where processes listen, as /proc shows it (Linux), and an address that is not loopback to be listened on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

_LISTEN = "0A"


def listening(pids: Iterable[int]) -> list[IPv4Address | IPv6Address]:
    """The addresses of the TCP sockets on which `pids` listen, one for each socket."""
    inodes = {inode for pid in pids for inode in _sockets(pid)}
    lines = (line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines())
    return [_address(columns[1]) for columns in lines if columns[3] == _LISTEN and columns[9] in inodes]


def own_address() -> str | None:
    """This machine's address on the way to others, None without a way. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _sockets(pid: int) -> Iterator[str]:
    """Inodes of a process's sockets."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if (target := str(entry.readlink())).startswith("socket:["):
                yield target.removeprefix("socket:[").removesuffix("]")


def _address(written: str) -> IPv4Address | IPv6Address:
    """The address in "0100007F:1F90": 32-bit words, each in this machine's (little-endian) order."""
    digits = written.partition(":")[0]
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    address = ip_address(b"".join(words))
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
