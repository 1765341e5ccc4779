"""The command line, `polylogit COMMAND`. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic

import msgspec

from gate.errors import GateError
from gate.options import Metavar, Positional, T, check_outputs, fill, made, port
from server import __version__, logs
from server.config import LoggingConfig, load_config, with_gate
from server.errors import PolylogitError
from server.logs import LogOptions
from server.tools.options import BenchOptions, EvaluateOptions, ExplainOptions, ReportOptions, TopOptions
from server.training.options import RecordOptions, TrainOptions

NOBODY_READS = 141
"""The exit code of a program that SIGPIPE ended: 128 + 13."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Serve a deployment until SIGTERM."""

    config: Annotated[Path, Positional("FILE")]
    """The deployment's configuration."""
    host: str | None = None
    """Listen here (default: http.host of the configuration)."""
    port: Annotated[int | None, port] = None
    """Listen here; 0 takes a free one (default: http.port of the configuration)."""
    gate: Annotated[Path | None, Metavar("CHECKPOINT")] = None
    """Fuse by this gate (default: gate.file of the configuration)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    """Run one expert for the host that serves, until SIGTERM."""

    config: Annotated[Path, Positional("FILE")]
    """The deployment's configuration."""
    name: Annotated[str, Positional("NAME")]
    """The expert to run."""
    listen: Annotated[str, Metavar("HOST:PORT")]
    """Where the serving host reaches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """Validate a deployment without loading weights."""

    config: Annotated[Path, Positional("FILE")]
    """The deployment's configuration."""


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """`polylogit NAME`."""

    name: str
    """On the command line."""
    options: type[T]
    """Its options; their docstring is the command's help."""
    run: Callable[[T, LogOptions], int]
    """The work; the exit code."""

    def add(self, commands: Any) -> None:
        """Add it to an argparse parser's `commands`."""
        text = self.options.__doc__ or ""
        parser = commands.add_parser(self.name, help=text.removesuffix("."), description=text)
        fill(parser, self.options)
        parser.set_defaults(start=self._start)

    def _start(self, values: dict[str, Any]) -> int:
        options = made(self.options, values)
        check_outputs(options)
        return self.run(options, made(LogOptions, values))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    values = vars(_parser().parse_args(arguments))
    logs.configure(made(LogOptions, values).over(LoggingConfig()), "polylogit")
    try:
        code = int(values["start"](values))
        if sys.stdout is not None:  # it is closed, in `>&-`
            sys.stdout.flush()
        return code
    except (PolylogitError, GateError) as error:
        if logs.in_json():
            logging.getLogger("polylogit").error(str(error))
        else:
            print(f"polylogit: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("polylogit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if _nobody_reads():
            return NOBODY_READS
        raise


def _nobody_reads() -> bool:
    """Whether nobody reads standard output any more; if so, what is left to write goes nowhere."""
    if sys.stdout is None:
        return False
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polylogit", description="Several LLMs answer as one, fused token by token.")
    parser.add_argument("--version", action="version", version=f"polylogit {__version__}")
    fill(parser, LogOptions)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _commands():
        command.add(commands)
    return parser


def _commands() -> list[Command[Any]]:
    return [
        Command("serve", ServeOptions, _serve),
        Command("expert", ExpertOptions, _expert),
        Command("check", CheckOptions, _check),
        Command("bench", BenchOptions, _bench),
        Command("top", TopOptions, _top),
        Command("record", RecordOptions, _record),
        Command("train", TrainOptions, _train),
        Command("evaluate", EvaluateOptions, _evaluate),
        Command("report", ReportOptions, _report),
        Command("explain", ExplainOptions, _explain),
    ]


def _serve(options: ServeOptions, log_options: LogOptions) -> int:
    from server.launch.check import check
    from server.launch.supervisor import Supervisor

    config = load_config(options.config)
    if options.gate is not None:
        config = with_gate(config, options.gate)
    given = {"host": options.host, "port": options.port}
    http = msgspec.structs.replace(config.http, **{key: value for key, value in given.items() if value is not None})
    config = msgspec.structs.replace(config, http=http, logging=log_options.over(config.logging))
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


def _expert(options: ExpertOptions, log_options: LogOptions) -> int:
    from server.launch.expert_host import ExpertHost

    config = load_config(options.config)
    config = msgspec.structs.replace(config, logging=log_options.over(config.logging))
    logs.configure(config.logging, "expert host")
    ExpertHost(config, options.name, options.listen).run()
    return 0


def _check(options: CheckOptions, _: LogOptions) -> int:
    from server.launch.check import check, check_port, check_remote

    config = load_config(options.config)
    for finding in check(config):
        print(finding)
    for finding in check_remote(config):
        print(finding)
    check_port(config)
    print(f"{options.config}: ok")
    return 0


def _bench(options: BenchOptions, _: LogOptions) -> int:
    from server.tools.bench import bench

    return bench(options)


def _top(options: TopOptions, _: LogOptions) -> int:
    from server.tools.top.watch import top

    return top(options)


def _record(options: RecordOptions, log_options: LogOptions) -> int:
    from server.training.record import record

    return record(options, log_options)


def _train(options: TrainOptions, log_options: LogOptions) -> int:
    from server.training.train import train

    return train(options, log_options)


def _evaluate(options: EvaluateOptions, _: LogOptions) -> int:
    from server.tools.evaluate import evaluate

    return evaluate(options)


def _report(options: ReportOptions, _: LogOptions) -> int:
    from server.tools.report import report

    return report(options)


def _explain(options: ExplainOptions, _: LogOptions) -> int:
    from server.tools.explain import explain

    return explain(options)


if __name__ == "__main__":
    sys.exit(main())
