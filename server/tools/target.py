"""The deployment that `evaluate` and `explain` ask: a running server, or one served for the time of the command."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator

from server.config import Config, load_config, with_gate
from server.errors import ConfigError
from server.launch.served import served
from server.tools.options import TargetOptions


def check_models(config: Config | None, option: str, models: Iterable[str]) -> None:
    """Raises ConfigError for one that `config` does not offer; what a server offers, it says itself."""
    offered = [] if config is None else config.models()
    if config is not None and (unknown := [name for name in models if name not in offered]):
        raise ConfigError(f"{option}: no model is named {unknown[0]!r} (there are {', '.join(offered)})")


@contextlib.contextmanager
def target(options: TargetOptions) -> Iterator[str]:
    """The base URL of the OpenAI endpoint to ask. Raises StartError."""
    if options.url is not None:
        yield options.url.rstrip("/").removesuffix("/v1") + "/v1"
    elif options.config is not None:
        with served(options.config, gate=options.gate) as url:
            yield f"{url}/v1"


def config_to_serve(options: TargetOptions) -> Config | None:
    """The configuration of what is to be served; None for a running server. Raises ConfigError."""
    if (options.config is None) == (options.url is None):
        raise ConfigError("give either a configuration file or --url")
    if options.config is None:
        if options.gate is not None:
            raise ConfigError("--gate needs a configuration file to serve")
        return None
    config = load_config(options.config)
    return config if options.gate is None else with_gate(config, options.gate)


def quiet() -> None:
    """No log line for every request."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
