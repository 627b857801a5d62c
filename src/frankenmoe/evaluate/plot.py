"""Draws quality against memory, a point per model, as SVG, PNG or PDF. Computes no scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from frankenmoe.charts import INK, Spec, check_drawing, draw
from frankenmoe.errors import ArtifactError

FORMATS = (".svg", ".png", ".pdf")
WIDTH, HEIGHT = 620, 380  # pixels of plot
LINE = 15  # pixels between two labels
LABEL_WIDTH = 0.25  # of the plot: labels nearer than that to the left or right may overlap
# from Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {
    "base": "#0072B2",
    "parent": "#56B4E9",
    "merge": "#E69F00",
    "random gates": "#CC79A7",
    "own expert forced": "#F0E442",
    "best parent per text": "#999999",
    "moe": "#D55E00",
    "model": "#009E73",
}
MB = 10**6


@dataclass(frozen=True)
class Point:
    """A model in the plot: its memory in bytes, its quality, and the bounds of the quality's interval."""

    name: str
    kind: str
    memory: int
    value: float
    low: float
    high: float


def check_plot(file: Path) -> None:
    """ArtifactError for a file name with another ending than FORMATS, ChartError without the drawing library."""
    if file.suffix not in FORMATS:
        raise ArtifactError(f"{file} must end in {', '.join(FORMATS)}", hint=f"write {file.with_suffix('.svg')}")
    check_drawing()


def plot(points: Sequence[Point], file: Path, *, quality: str) -> None:
    """Draws the points; `quality` names the vertical axis and says which way is better."""
    (drawn,) = draw([_spec(points, quality)], form=file.suffix.removeprefix("."))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(drawn)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be written: {error.strerror}", hint="choose another place") from error


def _spec(points: Sequence[Point], quality: str) -> Spec:
    widest = max(point.memory for point in points) / MB * 1.3  # room for the last label
    low, high = _range(points)
    labels = _label_heights(points, widest=widest, line=(high - low) * LINE / HEIGHT)
    rows = [
        {
            "name": point.name,
            "memory": point.memory / MB,
            "value": point.value,
            "low": min(point.low, point.value),
            "high": max(point.high, point.value),
            "colour": COLOURS.get(point.kind, INK),
            "label": label,
        }
        for point, label in zip(points, labels, strict=True)
    ]
    x = {
        "field": "memory", "type": "quantitative", "title": "memory of the weights (MB)",
        "scale": {"domain": [0, widest], "nice": False},
    }  # fmt: skip
    vertical = {"type": "quantitative", "title": quality, "scale": {"domain": [low, high], "nice": False}}
    colour = {"field": "colour", "type": "nominal", "scale": None}
    interval: Spec = {
        "mark": {"type": "errorbar", "ticks": {"size": 8}, "thickness": 1.5},
        "encoding": {"y": {"field": "low", **vertical}, "y2": {"field": "high"}, "color": colour},
    }
    dot: Spec = {
        "mark": {"type": "point", "size": 70, "filled": True, "opacity": 1},
        "encoding": {"y": {"field": "value", **vertical}, "color": colour},
    }
    name: Spec = {
        "mark": {"type": "text", "align": "left", "dx": 10, "fontSize": 12},
        "encoding": {"y": {"field": "label", **vertical}, "text": {"field": "name"}},
    }
    return {
        "width": WIDTH, "height": HEIGHT, "data": {"values": rows}, "encoding": {"x": x},
        "layer": [interval, dot, name],
    }  # fmt: skip


def _range(points: Sequence[Point]) -> tuple[float, float]:
    """The ends of the vertical axis, with room above and below all intervals."""
    low = min(min(point.low, point.value) for point in points)
    high = max(max(point.high, point.value) for point in points)
    margin = 0.12 * (high - low) or 0.1
    return low - margin, high + margin


def _label_heights(points: Sequence[Point], *, widest: float, line: float) -> list[float]:
    """Where each label stands on the vertical axis: at its point, or `line` above a label that is in the way."""
    heights: dict[int, float] = {}
    for at in sorted(range(len(points)), key=lambda index: points[index].value):
        near = [
            heights[other]
            for other in heights
            if abs(points[other].memory - points[at].memory) / MB < LABEL_WIDTH * widest
        ]
        heights[at] = max([points[at].value, *(height + line for height in near)])
    return [heights[at] for at in range(len(points))]
