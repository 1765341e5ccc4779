"""The command line, `polylogit COMMAND`. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path

from gate.errors import GateError
from server import __version__, logs
from server.config import LoggingConfig
from server.errors import PolylogitError
from server.tools.evaluate import Commands
from server.training import cli as training


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = _parser().parse_args(arguments)
    logs.configure(_logging(options, LoggingConfig()), "polylogit")
    try:
        return int(options.run(options))
    except (PolylogitError, GateError) as error:
        if options.log_format == "json":
            logging.getLogger("polylogit").error(str(error))
        else:
            print(f"polylogit: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("polylogit: interrupted", file=sys.stderr)
        return 130


def _logging(options: argparse.Namespace, configured: LoggingConfig) -> LoggingConfig:
    """As configured, or as the command line says."""
    return LoggingConfig(options.log_format or configured.format, options.log_level or configured.level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polylogit", description="Several LLMs answer as one, fused token by token.")
    parser.add_argument("--version", action="version", version=f"polylogit {__version__}")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="instead of logging.level")
    parser.add_argument("--log-format", choices=["text", "json"], help="instead of logging.format")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a deployment until SIGTERM")
    serve.add_argument("config", type=Path, metavar="FILE")
    serve.add_argument("--host", help="listen here instead of http.host")
    serve.add_argument("--port", type=_port, help="listen here instead of http.port; 0 takes a free one")
    serve.add_argument("--gate", type=Path, metavar="CHECKPOINT", help="this gate instead of gate.file")
    serve.set_defaults(run=_serve)

    expert = commands.add_parser("expert", help="run one expert for the host that serves, until SIGTERM")
    expert.add_argument("config", type=Path, metavar="FILE")
    expert.add_argument("name", metavar="NAME")
    expert.add_argument("--listen", required=True, metavar="HOST:PORT", help="where the serving host reaches it")
    expert.set_defaults(run=_expert)

    check = commands.add_parser("check", help="validate a deployment without loading weights")
    check.add_argument("config", type=Path, metavar="FILE")
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="measure fused decoding beside each expert alone")
    bench.add_argument("config", type=Path, metavar="FILE")
    bench.add_argument("--experts", help="comma-separated names of the experts to use (default: all)")
    bench.add_argument("--missing", choices=["tail", "exact"], help="instead of the configuration's")
    bench.add_argument("--sequences", default="1,8,32", help="numbers of concurrent sequences (default: %(default)s)")
    bench.add_argument("--tokens", type=int, default=64, help="tokens a sequence in each short run")
    bench.add_argument("--prompt-tokens", type=int, default=32)
    bench.add_argument("--rounds", type=int, default=15, help="interleaved rounds; medians are over these")
    bench.add_argument("--gate", action="store_true", help="fuse by the configured gate, and tell its share of a tick")
    bench.add_argument("--json", type=Path, help="write all measurements here")
    bench.set_defaults(run=_bench)

    top = commands.add_parser("top", help="watch a running server")
    top.add_argument("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="default: %(default)s")
    top.add_argument("--once", action="store_true", help="print one frame, over one interval")
    top.add_argument("--interval", type=float, default=1.0, help="seconds between readings (default: %(default)g)")
    top.add_argument("--api-key-file", type=Path, metavar="FILE", help="instead of POLYLOGIT_API_KEY")
    top.set_defaults(run=_top)

    training.add_commands(commands)
    Commands(commands).add()
    return parser


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to 65535")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    import msgspec

    from server.config import load_config, with_gate
    from server.launch.check import check
    from server.launch.supervisor import Supervisor

    config = load_config(options.config)
    if options.gate is not None:
        config = with_gate(config, options.gate)
    changes = {key: getattr(options, key) for key in ("host", "port") if getattr(options, key) is not None}
    http = msgspec.structs.replace(config.http, **changes)
    config = msgspec.structs.replace(config, http=http, logging=_logging(options, config.logging))
    options.log_format = config.logging.format
    logs.configure(config.logging, "supervisor")
    for finding in check(config):
        if finding.warning:
            logging.getLogger("polylogit").warning("%s: %s", finding.subject, finding.text)

    def announce(url: str) -> None:
        if config.logging.format == "json":
            facts = logs.fields(url=url, model=config.name, experts=config.expert_names, policy=config.default_policy)
            logging.getLogger("polylogit").info("ready", extra=facts)
            return
        body = json.dumps({"messages": [{"role": "user", "content": config.example_prompt}]})
        print(f"{config.name} is ready on {url} ({', '.join(config.expert_names)}; fused by {config.default_policy})")
        print(f"Try:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(body)}")
        print(f"or open {url}/", flush=True)

    Supervisor(config, announce).run()
    return 0


def _expert(options: argparse.Namespace) -> int:
    import msgspec

    from server.config import load_config
    from server.launch.expert_host import ExpertHost

    config = load_config(options.config)
    config = msgspec.structs.replace(config, logging=_logging(options, config.logging))
    options.log_format = config.logging.format
    logs.configure(config.logging, "expert host")
    ExpertHost(config, options.name, options.listen).run()
    return 0


def _check(options: argparse.Namespace) -> int:
    from server.config import load_config
    from server.launch.check import check, check_port, check_remote

    config = load_config(options.config)
    for finding in check(config):
        print(finding)
    for finding in check_remote(config):
        print(finding)
    check_port(config)
    print(f"{options.config}: ok")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from server.tools.bench import bench

    return bench(options)


def _top(options: argparse.Namespace) -> int:
    from server.tools.top.cli import top

    return top(options)


if __name__ == "__main__":
    sys.exit(main())
