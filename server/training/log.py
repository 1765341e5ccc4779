"""A training on disk and on the screen: what was measured, as curves, and where to go on after an interruption.

Beside `gate.pt` stands `gate.training/` with curves.csv, curves.png, and, until the training is done, state.pt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from gate.training.curves import Point, plot, write_csv
from gate.training.fit import FitProgress, TrainingError


class TrainingLog:
    """`settings` (JSON-like) decide what is trained: a training goes on only under the same. Raises TrainingError."""

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._settings = settings
        self._directory = output.with_suffix(".training")
        self._directory.mkdir(parents=True, exist_ok=True)
        self._state = self._directory / "state.pt"
        self.progress = self._restored() if self._state.exists() else FitProgress()

    def save(self) -> None:
        """Write the curves, and the state, whole or not at all."""
        progress = self.progress
        state = {field.name: getattr(progress, field.name) for field in fields(progress)}
        state["points"] = [asdict(point) for point in progress.points]
        partial = self._state.with_suffix(".partial")
        torch.save({"settings": self._settings, "progress": state}, partial)
        partial.replace(self._state)
        write_csv(progress.points, self._directory / "curves.csv")

    def finish(self) -> None:
        """Nothing is left to go on with."""
        write_csv(self.progress.points, self._directory / "curves.csv")
        plot(self.progress.points, self._directory / "curves.png")
        self._state.unlink(missing_ok=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[FitProgress], None]]:
        """A progress bar of one phase, and what reports to it after each measurement."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bar(*columns, TextColumn("{task.fields[last]}"), console=self.console) as bar:
            task = bar.add_task(title, total=total, completed=self.progress.step, last="")

            def report(progress: FitProgress) -> None:
                self.save()
                bar.update(task, completed=progress.step, last=_shown(progress.points))

            yield report

    def _restored(self) -> FitProgress:
        try:
            saved = torch.load(self._state, map_location="cpu", weights_only=True)  # `--device` may change
            old, state = saved["settings"], saved["progress"]
            points = [Point(**point) for point in state.pop("points")]
            progress = FitProgress(**state, points=points)
        except Exception as error:  # torch raises many kinds for a damaged file
            kind = type(error).__name__
            raise TrainingError(f"{self._state}: cannot be read ({kind}); delete it to begin anew") from None
        for key in {**old, **self._settings}:
            if old.get(key) != self._settings.get(key):
                change = f"{key} was {old.get(key)}, is now {self._settings.get(key)}"
                raise TrainingError(f"{self._state} is of another training: {change}; delete it to begin anew")
        self.console.print(f"going on at {progress.phase} {progress.step}, from {self._state}", soft_wrap=True)
        return progress


def _shown(points: list[Point]) -> str:
    """The last known value of each measure of the current phase."""
    known: dict[str, float] = {}
    for point in points:
        if point.phase == points[-1].phase:
            known |= {name: value for name, value in asdict(point).items() if isinstance(value, float)}
    return " ".join(f"{name} {value:.3f}" for name, value in known.items())
