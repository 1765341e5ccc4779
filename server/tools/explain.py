"""`polylogit explain`: which expert chose each token of an answer; the work is in `gate`."""

from __future__ import annotations

from gate.evaluation.explain import ask, write_html, write_png
from server.tools.options import ExplainOptions
from server.tools.target import check_models, config_to_serve, quiet, target


def explain(options: ExplainOptions) -> int:
    """Run the command; the exit code. Raises ConfigError, StartError, GateError."""
    quiet()
    check_models(config_to_serve(options), "--model", [] if options.model is None else [options.model])
    with target(options) as url:
        answer = ask(url, options.model, options.prompt, options.max_tokens)
    if options.html is not None:
        write_html(answer, options.html)
    if options.png is not None:
        write_png(answer, options.png)
    for token in answer.tokens:
        weights = "  ".join(f"{name} {value:5.2f}" for name, value in token.coefficients.items())
        print(f"{token.text!r:14} {weights}  entropy {token.entropy:.2f}")
    return 0
