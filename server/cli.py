"""The command line, `polylogit COMMAND`. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from gate.errors import GateError
from server import __version__, logs
from server.config import Logging
from server.errors import PolylogitError
from server.evaluation import Commands

_GRADERS = "exact, numeric[:TOLERANCE], regex[:PATTERN], json, python[:SECONDS], or package.module:function"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = _parser().parse_args(arguments)
    logs.configure(_logging(options, Logging()), "polylogit")
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


def _logging(options: argparse.Namespace, configured: Logging) -> Logging:
    """As configured, or as the command line says."""
    return Logging(options.log_format or configured.format, options.log_level or configured.level)


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

    _add_record(commands)
    _add_train(commands)
    Commands(commands).add()
    return parser


def _add_record(commands: Any) -> None:
    record = commands.add_parser("record", help="make graded responses for a gate to learn from")
    record.add_argument("config", type=Path, metavar="FILE")
    record.add_argument("--prompts", type=Path, required=True, help='JSON lines: "id", "messages", "answer", ...')
    record.add_argument("--grader", required=True, help=_GRADERS)
    record.add_argument("--output", type=Path, required=True, help="directory of the traces; goes on if some are there")
    record.add_argument("--policies", help="comma-separated experts and policies (default: all that need no gate)")
    record.add_argument("--gate", type=Path, help="also draw with this gate checkpoint")
    record.add_argument("--answers", action="store_true", help='also score the prompts\' "answer"')
    record.add_argument("--responses", type=Path, help='also score these: JSON lines of "id" and "response"')
    record.add_argument("--samples", type=_positive, default=1, help="responses of each policy to each prompt")
    record.add_argument("--temperature", type=float, default=1.0)
    record.add_argument("--max-tokens", type=_positive, default=512, help="longer responses are cut and count as wrong")
    record.add_argument("--limit", type=_positive, help="use only the first prompts")
    record.add_argument("--no-hidden", dest="hidden", action="store_false", help="leave out hidden states")
    record.add_argument("--seed", type=int, default=0)
    record.set_defaults(run=_record)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a gate on recorded responses")
    train.add_argument("config", type=Path, metavar="FILE")
    train.add_argument("--traces", type=Path, required=True, help="written by polylogit record")
    train.add_argument("--output", type=Path, default=Path("gate.pt"), help="the checkpoint (default: %(default)s)")
    train.add_argument("--inputs", default="topk,hidden", help="topk, hidden or both (default: %(default)s)")
    train.add_argument("--state-size", type=int, default=0, help="of a recurrent state (default: none)")
    train.add_argument("--projected-size", type=_positive, default=12, help="of each expert's projected hidden state")
    train.add_argument("--space", choices=["logprob", "prob"], default="logprob")
    train.add_argument("--updates", type=_positive, default=1000, help="most updates on recorded responses")
    train.add_argument("--batch-size", type=_positive, default=128, help="responses an update")
    train.add_argument("--rate", type=float, default=3e-3, help="learning rate on recorded responses")
    train.add_argument("--negative-weight", type=float, default=0.02, help="of a wrong response's tokens")
    train.add_argument("--validation", type=_share, default=0.1, help="share of the prompts held out")
    train.add_argument("--responses", type=_positive, help="use only so many responses, drawn at random")
    train.add_argument("--refine-steps", type=int, default=0, help="then learn from the gate's own samples")
    train.add_argument("--prompts", type=Path, help="refinement: prompts to draw for")
    train.add_argument("--grader", help=f"refinement: {_GRADERS}")
    train.add_argument("--refine-prompts", type=_positive, default=32, help="refinement: prompts a step")
    train.add_argument("--group", type=_several, default=8, help="refinement: samples a prompt")
    train.add_argument("--refine-rate", type=float, default=1e-3, help="refinement: learning rate")
    train.add_argument("--kl", type=float, default=0.01, help="refinement: weight of the divergence from the start")
    train.add_argument("--temperature", type=float, default=1.0, help="refinement: of the samples")
    train.add_argument("--max-tokens", type=_positive, default=512, help="refinement: longer samples count as wrong")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", help="where to train (default: a GPU if there is one)")
    train.set_defaults(run=_train)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _several(text: str) -> int:
    if (value := int(text)) < 2:
        raise argparse.ArgumentTypeError("must be at least 2")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 0 and below 1")
    return value


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to 65535")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    import msgspec

    from server.check import check
    from server.config import load_config, with_gate
    from server.supervisor import Supervisor

    config = load_config(options.config)
    if options.gate is not None:
        config = with_gate(config, options.gate)
    changes = {key: getattr(options, key) for key in ("host", "port") if getattr(options, key) is not None}
    http = msgspec.structs.replace(config.http, **changes)
    config = msgspec.structs.replace(config, http=http, logging=_logging(options, config.logging))
    options.log_format = config.logging.format
    logs.configure(config.logging, "supervisor")
    for line in check(config):
        if "warning" in line:
            logging.getLogger("polylogit").warning(line)

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
    from server.remote.host import ExpertHost

    config = load_config(options.config)
    config = msgspec.structs.replace(config, logging=_logging(options, config.logging))
    options.log_format = config.logging.format
    logs.configure(config.logging, "expert host")
    ExpertHost(config, options.name, options.listen).run()
    return 0


def _check(options: argparse.Namespace) -> int:
    from server.check import check, check_port, check_remote
    from server.config import load_config

    config = load_config(options.config)
    for line in check(config):
        print(line)
    for line in check_remote(config):
        print(line)
    check_port(config)
    print(f"{options.config}: ok")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from server.bench import bench

    return bench(options)


def _record(options: argparse.Namespace) -> int:
    from server.record import record

    return record(options)


def _train(options: argparse.Namespace) -> int:
    from server.train import train

    return train(options)


def _top(options: argparse.Namespace) -> int:
    from server.top import top

    return top(options)


if __name__ == "__main__":
    sys.exit(main())
