"""Tables and plots of evaluation results: rows are models, columns domains, every cell with its interval.

Joins several results files over the same prompts. Knows nothing of how answers were made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gate.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Bootstrap, Estimate
from gate.evaluation.results import EvaluationError, Results, load_results


@dataclass(frozen=True, slots=True)
class ResultTable:
    """Accuracies by row label and domain."""

    bootstrap: Bootstrap
    """The resamples that the intervals come from."""
    right: dict[str, list[int]]
    """Label -> 0 or 1 for each prompt."""
    cells: dict[str, dict[str, Estimate]]
    """Label -> domain, or "all" -> accuracy."""

    @property
    def columns(self) -> list[str]:
        """The domains, then "all" where there are several."""
        domains = self.bootstrap.domains
        return [*domains, "all"] if len(domains) > 1 else domains


@dataclass(frozen=True, slots=True)
class Comparison:
    """The row under test against the best of some other rows, column by column."""

    label: str
    """The row under test."""
    others: str
    """Which rows it is compared with, in words."""
    best: dict[str, str]
    """Column -> the other row with the highest accuracy."""
    difference: dict[str, Estimate]
    """Column -> the row under test minus the best other, paired, in shares."""
    apart: dict[str, bool]
    """Column -> whether the two rows' own intervals do not overlap."""


def join(files: Sequence[Path]) -> Results:
    """One Results of several over the same prompts and grader. Raises EvaluationError when they differ."""
    parts = [load_results(file) for file in files]
    first = parts[0]
    for file, part in zip(files, parts, strict=True):
        if (part.prompts_sha256, part.grader) != (first.prompts_sha256, first.grader):
            raise EvaluationError(f"{file}: other prompts or another grader than {files[0]}")
        if twice := set(part.models) & set(first.models) if part is not first else set():
            raise EvaluationError(f"{file}: {sorted(twice)[0]!r} is also in an earlier file")
        first.models |= part.models
    return first


def tabulate(results: Results, seed: int = 0) -> ResultTable:
    """Every model's accuracies with intervals."""
    if not results.models:
        raise EvaluationError(f"no answers for {results.prompts}")
    bootstrap = Bootstrap(results.domains, seed=seed)
    right = {label: answers.right for label, answers in results.models.items()}
    return ResultTable(bootstrap, right, {label: bootstrap.accuracy(values) for label, values in right.items()})


def compare(table: ResultTable, label: str, against: Sequence[str] = ()) -> Comparison:
    """`label` against the best of `against` (default: all other rows). Raises EvaluationError for unknown labels."""
    others = list(against) or [name for name in table.right if name != label]
    if unknown := [name for name in (label, *others) if name not in table.right]:
        raise EvaluationError(f"no row is named {unknown[0]!r} (there are {', '.join(table.right)})")
    if not others:
        raise EvaluationError(f"no other row to compare {label!r} with")
    best, difference, apart = {}, {}, {}
    for column in table.columns:
        best[column] = max(others, key=lambda name: table.cells[name][column].mean)
        difference[column] = table.bootstrap.difference(table.right[label], table.right[best[column]])[column]
        apart[column] = not table.cells[label][column].overlaps(table.cells[best[column]][column])
    named = ", ".join(against) if against else "all other rows"
    return Comparison(label, named, best, difference, apart)


def markdown(table: ResultTable, comparisons: Sequence[Comparison] = ()) -> str:
    """The table, a note on the intervals, and the comparisons."""
    lines = _grid(["model", *table.columns], [_row(table, label) for label in table.cells])
    counts = {domain: table.bootstrap.count(domain) for domain in table.bootstrap.domains}
    numbers = ", ".join(f"{count} {domain}" for domain, count in counts.items())
    lines += [
        "",
        f"Share of right answers and its {CONFIDENCE:.0%} interval: percentile bootstrap over prompts ({numbers}), "
        f"{RESAMPLES:,} resamples; exact binomial where all answers of a cell are right, or all wrong, "
        "or all paired differences are equal.",
    ]
    for comparison in comparisons:
        lines += ["", *_comparison_lines(comparison)]
    return "\n".join(lines) + "\n"


def plot(table: ResultTable, path: Path) -> None:
    """A PNG: one panel a column, one point with its interval a row."""
    from matplotlib.figure import Figure

    labels = list(table.cells)
    figure = Figure(figsize=(2.2 + 1.9 * len(table.columns), 1.0 + 0.24 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(table.columns), sharey=True, squeeze=False)[0]
    places = range(len(labels))
    for panel, column in zip(panels, table.columns, strict=True):
        cells = [table.cells[label][column] for label in labels]
        means = [cell.mean for cell in cells]
        reach = [[c.mean - c.low for c in cells], [c.high - c.mean for c in cells]]
        panel.errorbar(means, places, xerr=reach, fmt="o", markersize=4, capsize=2, linewidth=1.2, color="#22577a")
        panel.set_title(column, fontsize=10, parse_math=False)
        panel.set_xlim(-0.04, 1.04)
        panel.grid(axis="both", linewidth=0.4, color="#cccccc")
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(list(places), labels, parse_math=False)
    panels[0].invert_yaxis()
    figure.supxlabel(f"share of right answers, {CONFIDENCE:.0%} interval", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _row(table: ResultTable, label: str) -> list[str]:
    return [label, *(_cell(table.cells[label][column]) for column in table.columns)]


def _cell(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _comparison_lines(comparison: Comparison) -> list[str]:
    rows = [
        [
            column,
            comparison.best[column],
            f"{d.mean:+.3f} [{d.low:+.2f}, {d.high:+.2f}]",
            _yes(comparison.apart[column]),
        ]
        for column, d in comparison.difference.items()
    ]
    title = f"**{comparison.label}** minus the best of {comparison.others}; paired by prompt:"
    return [title, "", *_grid(["prompts", "best of these", "difference", "intervals apart"], rows)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _grid(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
