"""`polylogit evaluate`: which answers may be taken up, and which deployment is asked; the work is in `gate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from gate.evaluation.endpoint import collect_answers, labelled
from gate.evaluation.graders import load_grader
from gate.evaluation.prompts import check_gradable, read_prompts
from gate.evaluation.report import markdown, tabulate
from gate.evaluation.results import EvaluationError, Results, load_results, new_results
from gate.files import sha256_file
from server.config import Config
from server.tools.options import EvaluateOptions
from server.tools.provenance import about
from server.tools.target import check_models, config_to_serve, quiet, target
from server.training.recorder import fingerprints


def evaluate(options: EvaluateOptions) -> int:
    """Run the command; the exit code. Raises ConfigError, StartError, GateError."""
    quiet()
    config = config_to_serve(options)
    check_models(config, "--models", labelled(list(options.models)).values())
    grader = load_grader(options.grader)
    questions = read_prompts(options.prompts, options.limit)
    check_gradable(questions, grader)
    results = new_results(options.prompts, questions, options.grader)
    settings = _settings(options, config)
    if options.output.exists():
        results = _taken_up(options.output, results, settings)
    results.about = {**about(), "settings": settings}
    with target(options) as url:
        asyncio.run(
            collect_answers(
                url,
                list(options.models),
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


def _settings(options: EvaluateOptions, config: Config | None) -> dict[str, Any]:
    """What answers depend on beside prompts and grader, as far as it can be known: digests of what is served."""
    settings: dict[str, Any] = {"max_tokens": options.max_tokens, "config": None, "gate": None, "experts": None}
    if options.config is None or config is None:
        return settings
    settings |= {"config": sha256_file(options.config), "experts": fingerprints(config)}
    if config.gate is not None and (gate := config.path(config.gate.file)).is_file():
        settings["gate"] = sha256_file(gate)
    return settings


def _taken_up(path: Path, fresh: Results, settings: dict[str, Any]) -> Results:
    """The results at `path`, if they are of the same prompts, grader and settings. Raises EvaluationError."""
    found = load_results(path)
    if (found.prompts_sha256, found.grader) != (fresh.prompts_sha256, fresh.grader):
        raise EvaluationError(f"{path} holds answers to other prompts or of another grader; move it away first")
    if (before := found.about.get("settings", settings)) != settings:
        changed = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise EvaluationError(f"{path} holds answers with another {changed}; move it away first")
    return found
