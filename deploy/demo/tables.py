"""The experiment's tables and plots from its evaluation files."""

from pathlib import Path

from gate.evaluation import report
from gate.evaluation.results import Results, save_results


def write(
    files: list[Path],
    folder: Path,
    *,
    order: list[str],
    gate: str,
    against: list[list[str]],
    efficiency: dict[str, int],
) -> None:
    """table.{md,png} with the rows of `order`, data-efficiency.{md,png}, and results.json with every answer.

    `gate`: the row compared with the best of each group of `against`. `efficiency`: row -> number of graded responses.
    """
    results = report.join(files)
    save_results(results, folder / "results.json")
    table = report.tabulate(_rows(results, order))
    comparisons = [report.compare(table, gate, group) for group in against]
    (folder / "table.md").write_text(report.markdown(table, comparisons), encoding="utf-8")
    report.plot(table, folder / "table.png")
    few = report.tabulate(_rows(results, [*efficiency]))
    (folder / "data-efficiency.md").write_text(report.markdown(few), encoding="utf-8")
    plot_efficiency(few, efficiency, folder / "data-efficiency.png")


def plot_efficiency(table: report.ResultTable, counts: dict[str, int], path: Path) -> None:
    """Accuracy against the number of graded responses, a line a domain, shaded by its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    panel = figure.subplots()
    for domain in table.bootstrap.domains:
        cells = [table.cells[label][domain] for label in counts]
        (line,) = panel.plot(list(counts.values()), [cell.mean for cell in cells], marker="o", label=domain)
        panel.fill_between(
            list(counts.values()), [c.low for c in cells], [c.high for c in cells], alpha=0.15, color=line.get_color()
        )
    panel.set_xscale("log")
    panel.set_xticks(list(counts.values()), [f"{count:,}" for count in counts.values()])
    panel.minorticks_off()
    panel.set(xlabel="graded responses", ylabel="share of right answers", ylim=(-0.03, 1.03))
    panel.grid(linewidth=0.4, color="#cccccc")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _rows(results: Results, labels: list[str]) -> Results:
    """The results of these rows only, in this order."""
    return Results(
        results.prompts,
        results.prompts_sha256,
        results.ids,
        results.domains,
        results.grader,
        {label: results.models[label] for label in labels},
    )
