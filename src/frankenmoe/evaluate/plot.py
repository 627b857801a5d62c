"""Quality against memory, a point per model, as a PNG or SVG; computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from frankenmoe.errors import ArtifactError

KINDS = (".svg", ".png", ".pdf")
# Okabe and Ito's palette, which colour-blind eyes tell apart
COLOURS = {
    "base": "#0072B2",
    "parent": "#56B4E9",
    "average": "#E69F00",
    "random gates": "#CC79A7",
    "moe": "#D55E00",
    "model": "#009E73",
}
MB = 10**6


@dataclass(frozen=True)
class Point:
    """A model in the plot: bytes of memory, its quality, and the bounds of that."""

    name: str
    kind: str
    memory: int
    value: float
    low: float
    high: float


def check_plot(file: Path) -> None:
    """ArtifactError for a name whose ending is no picture's."""
    if file.suffix not in KINDS:
        raise ArtifactError(f"{file} must end in {', '.join(KINDS)}", hint=f"write {file.with_suffix('.svg')}")


def plot(points: Sequence[Point], file: Path, *, quality: str) -> None:
    """Draws the points; `quality` names the vertical axis and says which way is better."""
    matplotlib.rcParams["svg.hashsalt"] = "frankenmoe"  # the same points give the same file
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        errors = [[max(0.0, point.value - point.low)], [max(0.0, point.high - point.value)]]
        axes.errorbar(
            point.memory / MB, point.value, yerr=errors, fmt="o", capsize=3, color=COLOURS.get(point.kind, "#000000")
        )
        axes.annotate(
            point.name, (point.memory / MB, point.value), xytext=(6, 4), textcoords="offset points", fontsize=9
        )
    axes.set_xlabel("memory of the weights (MB)")
    axes.set_ylabel(quality)
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be written: {error.strerror}", hint="choose another place") from error
