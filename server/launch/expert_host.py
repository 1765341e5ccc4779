"""The process that `polylogit expert` is: one expert of a deployment whose coordinator is on another host. It starts
the worker, one process for each rank, and ends with it; starting it again is the container runtime's job.
"""

from __future__ import annotations

import logging
import signal

from server.config import Config, ExpertConfig, parse_address
from server.errors import StartError
from server.launch.check import check
from server.launch.children import Children
from server.launch.roles import start_expert
from server.launch.sockets import bound, private_directory

log = logging.getLogger("polylogit")

_POLL_SECONDS = 0.1


class ExpertHost:
    """Runs expert `name`, for the coordinator that connects to `listen` ("host:port")."""

    def __init__(self, config: Config, name: str, listen: str) -> None:
        """Raises StartError if the deployment is wrong, or has no such expert for another host."""
        self._config = config
        self._index = _index(config, name)
        self._address = parse_address(listen)
        self._stopping = False
        check(config, host=self._expert.host)

    @property
    def _expert(self) -> ExpertConfig:
        return self._config.experts[self._index]

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError if the worker ends by itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        with bound("--listen", *self._address) as listener, private_directory() as directory:
            ranks = start_expert(self._config, self._index, 0, directory, listener)
            listener.close()  # the worker has its own: when it ends, nobody is accepted any more
            try:
                self._watch(ranks)
            finally:
                ranks.reap(0.0)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _watch(self, ranks: Children) -> None:
        while not self._stopping:
            ranks.check()
            ranks.wait(_POLL_SECONDS)


def _index(config: Config, name: str) -> int:
    if name not in config.expert_names:
        raise StartError(f"no expert is named {name!r} (there are {', '.join(config.expert_names)})")
    index = config.expert_names.index(name)
    if config.experts[index].address is None:
        raise StartError(f"expert {name} has no address in the configuration: `polylogit serve` runs it itself")
    return index
