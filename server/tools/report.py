"""`polylogit report`: results of several evaluations in one table and one plot; the work is in `gate`."""

from __future__ import annotations

from gate.evaluation.report import compare, join, markdown, plot, tabulate
from server.errors import ConfigError
from server.tools.options import ReportOptions


def report(options: ReportOptions) -> int:
    """Run the command; the exit code. Raises ConfigError, GateError."""
    if options.against and options.compare is None:
        raise ConfigError("report: --against needs --compare, the row to compare with them")
    table = tabulate(join(options.results), options.seed)
    comparisons = [] if options.compare is None else [compare(table, options.compare, options.against)]
    text = markdown(table, comparisons)
    if options.markdown is None:
        print(text)
    else:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
    if options.plot is not None:
        plot(table, options.plot)
    return 0
