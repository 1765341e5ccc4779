"""What happened in a training: one row a measurement, as a CSV file and a plot."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement; None for what was not measured."""

    phase: str
    """"broadcast" (recorded responses) or "refine" (the gate's own samples)."""
    step: int
    """Updates (broadcast) or steps (refine) before it."""
    loss: float | None = None
    """Mean training loss since the last point."""
    validation: float | None = None
    """On held-out prompts: the loss (broadcast), or the greedy policy's mean reward (refine)."""
    reward: float | None = None
    """Mean, of the policy's samples."""
    divergence: float | None = None
    """Nats a token from the gate at the start of the phase."""


def write_csv(points: list[Point], path: Path) -> None:
    names = [field.name for field in fields(Point)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def plot(points: list[Point], path: Path) -> None:
    """A PNG: losses of the first phase, rewards of the second if there was one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = [phase for phase in ("broadcast", "refine") if any(point.phase == phase for point in points)]
    figure = Figure(figsize=(5 * len(phases), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    curves = {"broadcast": ("loss", "validation"), "refine": ("reward", "validation", "divergence")}
    for place, phase in enumerate(phases, 1):
        axes = figure.add_subplot(1, len(phases), place)
        for name in curves[phase]:
            of = [(point.step, getattr(point, name)) for point in points if point.phase == phase]
            known = [(step, value) for step, value in of if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), label=name)
        axes.set_title("recorded responses: loss" if phase == "broadcast" else "own samples: mean reward")
        axes.set_xlabel("updates" if phase == "broadcast" else "steps")
        axes.legend()
    figure.savefig(path, dpi=120)
