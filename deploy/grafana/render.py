"""Draws a dashboard from a Prometheus with matplotlib: the same file, the same queries, for pictures without a Grafana.

    python deploy/grafana/render.py http://127.0.0.1:9090 deploy/grafana/dashboards/experts.json experts.png

Knows the panel types that the dashboards beside it use, and Grafana's variables as far as they do.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gate.options import Output, Positional, run_module

Panel = dict[str, Any]

_BACK, _PANEL, _TEXT, _FAINT = "#111217", "#181b1f", "#d8d9da", "#8e8e8e"
_COLOURS = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c", "blue": "#5794f2", "orange": "#ff9830"}
_SERIES = [*(_COLOURS[name] for name in ("green", "yellow", "blue", "orange", "red")), "#b877d9", "#8ab8ff", "#96d98d"]
_PIXELS = 60  # a grid unit's width; its height is half of that
_DPI = 100


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its labels, and values [T] at `times` [T]."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]


class Prometheus:
    """A Prometheus's query API. Raises httpx.HTTPStatusError for a query it refuses."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url.rstrip('/')}/api/v1/", timeout=30)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **parameters: Any) -> Any:
        response = self._http.get(path, params=parameters)
        response.raise_for_status()
        return response.json()["data"]

    def at(self, expr: str, moment: float) -> list[Series]:
        result = self.get("query", query=expr, time=moment)["result"]
        return [Series(entry["metric"], [entry["value"][0]], [float(entry["value"][1])]) for entry in result]

    def over(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        result = self.get("query_range", query=expr, start=start, end=end, step=step)["result"]
        return [
            Series(entry["metric"], [at for at, _ in entry["values"]], [float(value) for _, value in entry["values"]])
            for entry in result
        ]

    def values(self, label: str) -> list[str]:
        """A label's values."""
        return list(self.get(f"label/{label}/values"))


@dataclass(frozen=True, slots=True)
class View:
    """What a dashboard shows: the time range in seconds since the epoch, the step, and what its variables stand for."""

    start: float
    end: float
    step: float
    variables: dict[str, str]

    def fill(self, text: str, **more: str) -> str:
        """`text` with its variables replaced."""
        values = self.variables | {"__range": f"{max(1, round(self.end - self.start))}s"} | more
        return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), text)

    def read(self, prometheus: Prometheus, target: Panel, **more: str) -> list[Series]:
        """What a query of a panel gives."""
        expr = self.fill(target["expr"], **more)
        if target.get("instant"):
            return prometheus.at(expr, self.end)
        return prometheus.over(expr, self.start, self.end, self.step)


def repeated(panels: list[Panel], values: dict[str, list[str]]) -> Iterator[tuple[Panel, dict[str, str]]]:
    """Each panel with the variables of its own: one that repeats comes once for each value, side by side."""
    for panel in panels:
        if (name := panel.get("repeat")) is None:
            yield panel, {}
            continue
        place, count = panel["gridPos"], min(len(values[name]), panel["maxPerRow"])
        for index, value in enumerate(values[name]):
            width = place["w"] // count
            moved = place | {"w": width, "x": place["x"] + width * (index % count)}
            yield panel | {"gridPos": moved}, {name: value}


def formatted(value: float, unit: str) -> str:
    """A value as Grafana would write it, roughly."""
    if math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        scale, name = next(((s, n) for s, n in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if abs(value) >= s), (1, "s"))
        return f"{value / scale:.3g} {name}"
    if unit == "bytes":
        scale, name = next(((s, n) for s, n in ((2**20, "MiB"), (2**10, "KiB")) if abs(value) >= s), (1, "B"))
        return f"{value / scale:.3g} {name}"
    return f"{value:.3g}" + {"reqps": " req/s", "cps": "/s", "ops": "/s"}.get(unit, "")


def render(prometheus: Prometheus, dashboard: Panel, view: View) -> Figure:
    """The whole dashboard."""
    values = {"expert": prometheus.values("expert")}
    placed = list(repeated(dashboard["panels"], values))
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in placed)
    width, height = 24 * _PIXELS, rows * _PIXELS / 2 + 40
    figure = pyplot.figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=_BACK)
    figure.text(10 / width, 1 - 24 / height, dashboard["title"], color=_TEXT, size=14, weight="bold")
    for panel, own in placed:
        place = panel["gridPos"]
        left, top = place["x"] * _PIXELS, 40 + place["y"] * _PIXELS / 2
        box = (left, height - top - place["h"] * _PIXELS / 2, place["w"] * _PIXELS, place["h"] * _PIXELS / 2)
        if panel["type"] == "row":
            figure.text((left + 10) / width, (box[1] + 9) / height, panel["title"], color=_TEXT, size=11, weight="bold")
            continue
        axes = _frame(figure, panel, view.fill(panel["title"], **own), box, (width, height))
        series = [
            (view.fill(target["legendFormat"], **own), found)
            for target in panel["targets"]
            for found in view.read(prometheus, target, **own)
        ]
        _DRAW[panel["type"]](axes, panel, [(_label(name, found), found) for name, found in series])
        if panel["type"] in ("timeseries", "heatmap"):
            _time_axis(axes, view)
    return figure


def _frame(
    figure: Figure, panel: Panel, title: str, box: tuple[float, float, float, float], size: tuple[float, float]
) -> Axes:
    """A panel's background and title; the axes inside it. `box` in pixels: left, bottom, width, height."""
    left, bottom, width, height = box
    at = [(left + 3) / size[0], (bottom + 3) / size[1], (width - 6) / size[0], (height - 6) / size[1]]
    background = matplotlib.patches.Rectangle((at[0], at[1]), at[2], at[3], color=_PANEL, transform=figure.transFigure)
    background.set_zorder(-1)
    figure.add_artist(background)
    figure.text((left + 12) / size[0], (bottom + height - 20) / size[1], title, color=_TEXT, size=9)
    inner = [(left + 62) / size[0], (bottom + 58) / size[1], (width - 82) / size[0], (height - 92) / size[1]]
    axes = figure.add_axes((inner[0], inner[1], inner[2], inner[3]), facecolor=_PANEL)
    axes.tick_params(colors=_FAINT, labelsize=7, length=0)
    axes.grid(color="#2c3235", linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _label(legend: str, series: Series) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: series.labels.get(found[1], ""), legend)


def _time_axis(axes: Axes, view: View) -> None:
    ticks = np.linspace(view.start, view.end, 7)[1:-1]
    axes.set_xlim(view.start, view.end)
    axes.set_xticks(ticks, [time.strftime("%H:%M:%S", time.gmtime(tick)) for tick in ticks])


def _colours(panel: Panel, names: list[str]) -> list[str]:
    fixed = {
        override["matcher"]["options"]: _COLOURS.get(item["value"]["fixedColor"], _SERIES[0])
        for override in panel["fieldConfig"]["overrides"]
        for item in override["properties"]
    }
    order = sorted(set(names))
    return [fixed.get(name, _SERIES[order.index(name) % len(_SERIES)]) for name in names]


def _draw_lines(axes: Axes, panel: Panel, series: list[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    unit, custom = defaults["unit"], defaults["custom"]
    names = [name for name, _ in series]
    colours = _colours(panel, names)
    labels = [f"{name}  {formatted(_mean(found), unit)}" for name, found in series]
    if custom["stacking"]["mode"] != "none" and series:
        times = sorted({at for _, found in series for at in found.times})
        stacked = [
            [dict(zip(found.times, found.values, strict=True)).get(at, 0.0) for at in times] for _, found in series
        ]
        axes.stackplot(times, np.nan_to_num(stacked), colors=colours, labels=labels, alpha=0.75)
    else:
        for (_, found), colour, label in zip(series, colours, labels, strict=True):
            axes.plot(found.times, found.values, color=colour, linewidth=1.4, label=label)
            axes.fill_between(found.times, 0, found.values, color=colour, alpha=0.06)
    if custom["scaleDistribution"]["type"] == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.yaxis.set_major_formatter(lambda value, _: formatted(value, unit))
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.05, -20 / axes.bbox.height),
        ncols=max(1, round(axes.bbox.width / 105)),
        fontsize=6.5,
        frameon=False,
        labelcolor=_TEXT,
        handlelength=1,
        labelspacing=0.3,
        columnspacing=1.0,
    )


def _draw_heatmap(axes: Axes, panel: Panel, series: list[tuple[str, Series]]) -> None:
    """Buckets come cumulative; a cell is what one adds to the one below it."""
    series.sort(key=lambda entry: float(entry[0].replace("+Inf", "inf")))
    times = sorted({at for _, found in series for at in found.times})
    if not times:
        return
    cumulative = [
        [dict(zip(found.times, found.values, strict=True)).get(at, 0.0) for at in times] for _, found in series
    ]
    cells = np.diff(np.nan_to_num(cumulative), axis=0, prepend=0.0)
    shown = np.ma.masked_less_equal(cells, 1e-9)
    axes.pcolormesh([*times, 2 * times[-1] - times[-2]], np.arange(len(series) + 1), np.sqrt(shown), cmap="inferno")
    unit = panel["options"]["yAxis"]["unit"]
    every = max(1, len(series) // 8)
    places = range(0, len(series), every)
    axes.set_yticks([place + 1 for place in places], [_bound(series[place][0], unit) for place in places])
    axes.grid(visible=False)


def _bound(text: str, unit: str) -> str:
    return text if text == "+Inf" else formatted(float(text), unit)


def _draw_stat(axes: Axes, panel: Panel, series: list[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.axis("off")
    value = series[0][1].values[-1] if series else math.nan
    steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
    texts = {key: entry["text"] for mapping in defaults["mappings"] for key, entry in mapping["options"].items()}
    text = texts.get(f"{value:g}", formatted(value, defaults["unit"]))
    axes.text(0.45, 0.5, text, color=_COLOURS[steps[-1]["color"]], size=22, ha="center", va="center", weight="bold")


def _draw_bars(axes: Axes, panel: Panel, series: list[tuple[str, Series]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    names = [name for name, _ in series]
    values = [found.values[-1] for _, found in series]
    axes.barh(names, [defaults["max"]] * len(names), color="#22252b", height=0.6)
    axes.barh(names, values, color=_colours(panel, names), height=0.6)
    for row, value in enumerate(values):
        axes.text(defaults["max"] * 0.98, row, formatted(value, defaults["unit"]), color=_TEXT, ha="right", va="center")
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.tick_params(labelcolor=_TEXT, labelsize=9)


def _mean(series: Series) -> float:
    finite = [value for value in series.values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


_DRAW: dict[str, Callable[[Axes, Panel, list[tuple[str, Series]]], None]] = {
    "timeseries": _draw_lines,
    "heatmap": _draw_heatmap,
    "stat": _draw_stat,
    "bargauge": _draw_bars,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOptions:
    """Of this script."""

    prometheus: Annotated[str, Positional("URL")]
    """A running Prometheus."""
    dashboard: Annotated[Path, Positional("JSON")]
    """Grafana's description of the dashboard."""
    picture: Annotated[Path, Positional("PNG"), Output()]
    """Written."""
    minutes: float = 30.0
    """How far back."""
    end: float | None = None
    """Up to when, in seconds since the epoch (default: now)."""
    rate_interval: str = "1m"
    """Stands for $__rate_interval."""


def main(arguments: list[str] | None = None) -> None:
    run_module("render.py", __doc__, RenderOptions, run, arguments)


def run(options: RenderOptions) -> None:
    """Run the command."""
    end = time.time() if options.end is None else options.end
    variables = {"instance": ".*", "expert": ".*", "__rate_interval": options.rate_interval}
    view = View(end - 60 * options.minutes, end, max(1.0, options.minutes * 60 / 300), variables)
    dashboard = json.loads(options.dashboard.read_text(encoding="utf-8"))
    render(Prometheus(options.prometheus), dashboard, view).savefig(options.picture, facecolor=_BACK)


if __name__ == "__main__":
    main()
