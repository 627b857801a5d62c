"""The charts of an audit by layer, as Vega-Lite specifications.

Colours are CSS variables, so one drawing serves light and dark pages. No two lines differ by colour alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.charts import Spec, draw
from frankenmoe.palette import COLOURS

Facts = Mapping[str, Any]

WIDE, HALF, NARROW = 500, 200, 240  # pixels of plot: a column on a screen, half of one, a phone
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
DESCRIBED_CELLS = 1000  # more cells get no text for screen readers; the tables have the same numbers
LABELLED_CELLS = 260  # more cells leave no room for numbers
LOOK: Spec = {
    "background": "transparent",
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink)", "gridColor": "var(--line)",
        "domainColor": "var(--line)", "tickColor": "var(--line)",
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
    },
    "legend": {"labelColor": "var(--ink)", "labelFontSize": 12, "orient": "top", "title": None},
    "text": {"fill": "var(--ink)"},
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A chart: the question it belongs to, a caption, and its specification for a plot of a width in pixels."""

    key: str
    caption: str
    spec: Callable[[int], Spec]


@dataclass(frozen=True)
class Series:
    """One line of a chart: name, colour (a CSS value) and a value per layer, None if it is unknown."""

    name: str
    colour: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Figure:
    """A drawn chart: SVG elements for a screen and for a phone. `full` if it takes the whole width of the page."""

    chart: Chart
    full: bool
    wide: str
    narrow: str


def figures(found: Sequence[Sequence[Chart]]) -> list[list[Figure]]:
    """The charts of every report as figures, all drawn at once. Raises ChartError."""
    plans = [[(chart, _is_full(chart, charts)) for chart in charts] for charts in found]
    specs = [chart.spec(width) for rows in plans for chart, full in rows for width in (WIDE if full else HALF, NARROW)]
    drawings = (drawn.decode() for drawn in draw(specs, look=LOOK))
    return [[Figure(chart, full, next(drawings), next(drawings)) for chart, full in rows] for rows in plans]


def _is_full(chart: Chart, charts: Sequence[Chart]) -> bool:
    return chart.caption.startswith("Load") or sum(other.key == chart.key for other in charts) == 1


def charts(routers: Sequence[Facts], experts: Sequence[str]) -> tuple[Chart, ...]:
    """All charts of one MoE's outer routers, in the order of the questions."""
    layers = [facts["layer"] for facts in routers]

    def of(key: str, part: str) -> list[Any]:
        return [facts[part][key] for facts in routers]

    found = [_apart(layers, routers), _heat(layers, routers, experts)]
    found += [
        _lines("load", what, layers, [Series(what, line(0), of(key, "load"))], y=None, zero=True)
        for key, what in (
            ("cv", "Coefficient of variation of the load"),
            ("max_vio", "MaxVio: busiest expert over even"),
            ("entropy_share", "Gate entropy, share of ln E"),
            ("margin", "Margin of the k-th to the next, nats"),
        )
        if any(value is not None for value in of(key, "load"))
    ]
    if routers[0]["domains"] is not None:
        found.append(_own(layers, routers, experts))
    found.append(
        _lines(
            "gate", "Condition number of the gate, and centred, of its rows less their mean; the rule is mergekit's 5",
            layers,
            [
                Series("gate", line(0), of("condition", "gate")),
                Series("centred", line(5), of("condition_centred", "gate")),
            ],
            y=None, rule=5.0, log=True,
        )
    )  # fmt: skip
    found.append(_over(layers, routers))
    return tuple(chart for chart in found if chart is not None)


def line(index: int) -> str:
    """The CSS variable of a line's colour. The page defines one per palette colour, darker on light paper."""
    return f"var(--l{index % len(COLOURS)})"


def _apart(layers: Sequence[int], routers: Sequence[Facts]) -> Chart | None:
    """Distances of expert pairs: the nearest, the median and the farthest pair of each layer."""
    if routers[0]["apart"]["median"] is None:
        return None
    keys = (("farthest", 5), ("median", 0), ("nearest", 2))
    series = [Series(f"{key} pair", line(colour), [facts["apart"][key] for facts in routers]) for key, colour in keys]
    caption = "Distance of expert pairs by layer, in units of the reference's FFN norm"
    return _lines("moe", caption, layers, series, y="distance", zero=True)


def _own(layers: Sequence[int], routers: Sequence[Facts], experts: Sequence[str]) -> Chart:
    domains = [name for name, share in routers[0]["domains"]["own_first"].items() if share is not None]
    series = [
        Series(
            name,
            line(experts.index(name) if name in experts else index),
            [facts["domains"]["own_first"][name] for facts in routers],
        )
        for index, name in enumerate(domains)
    ]
    caption = "Share of a domain's tokens that go first to its own expert, by layer; the rule is chance"
    return _lines("domain", caption, layers, series, y="share of tokens", rule=1 / routers[0]["experts"], zero=True)


def _over(layers: Sequence[int], routers: Sequence[Facts]) -> Chart:
    series = [
        Series(f"capacity {factor}", line(colour), [facts["capacity"]["over"][factor] for facts in routers])
        for factor, colour in zip(routers[0]["capacity"]["over"], (5, 0, 2), strict=True)
    ]
    caption = "Share of assignments that a capacity would drop, by layer"
    return _lines("survive", caption, layers, series, y="share of assignments", zero=True)


def _lines(
    key: str,
    caption: str,
    layers: Sequence[int],
    series: Sequence[Series],
    *,
    y: str | None,
    rule: float | None = None,
    zero: bool = False,
    log: bool = False,
) -> Chart:
    rows = [
        {"layer": layer, "value": value, "line": each.name}
        for each in series
        for layer, value in zip(layers, each.values, strict=True)
        if value is not None
    ]
    names = [each.name for each in series]
    count = range(len(series))

    def scale(values: Sequence[Any]) -> Spec:
        return {"domain": names, "range": [values[index % len(values)] for index in count]}

    several = len(series) > 1
    layered: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 2, "aria": False},
            "encoding": {"strokeDash": {"field": "line", "scale": scale(DASHES), "legend": None, "sort": names}},
        },
        {
            "mark": {"type": "point", "size": 46, "filled": True, "opacity": 1, "strokeWidth": 0},
            "encoding": {
                "shape": {"field": "line", "scale": scale(SHAPES), "sort": names},
                "description": {"field": "description"},
            },
        },
    ]
    for row in rows:
        row["description"] = f"layer {row['layer']}, {row['line']}: {row['value']:.3g}"
    if rule is not None:
        layered.append(
            {
                "data": {"values": [{"value": rule}]},
                "mark": {"type": "rule", "strokeDash": [3, 3], "color": "var(--ink)", "opacity": 0.7, "aria": False},
                "encoding": {"y": {"field": "value", "type": "quantitative"}},
            }
        )
    x = {"field": "layer", "type": "ordinal", "axis": _layer_axis(layers), "title": "layer"}
    colour = {"field": "line", "scale": scale([each.colour for each in series]), "sort": names}

    highest = max([10.0, *(value for each in series for value in each.values if value is not None)])
    powers = [10**power for power in range(math.ceil(math.log10(highest)) + 1)]

    def spec(width: int) -> Spec:
        legend = {"symbolSize": 90, "columns": max(3, width // 120), "symbolStrokeWidth": 0} if several else None
        layered[1]["encoding"]["shape"]["legend"] = legend
        axis = {"format": "~g", "titleLimit": 150} | ({"values": powers} if log else {"tickCount": 4})
        scaled: Spec = {"type": "log", "domain": [powers[0], powers[-1]]} if log else {"zero": zero}
        vertical = {"field": "value", "type": "quantitative", "title": y, "scale": scaled | {"nice": True}}
        shared = {"y": vertical | {"axis": axis}}
        for part in layered[:2]:
            part["encoding"] |= {"x": x, "color": colour | {"legend": legend}}
        return {
            "width": width, "height": 150, "data": {"values": rows}, "encoding": shared, "layer": layered,
            "description": caption,
        }  # fmt: skip

    return Chart(key, caption, spec)


def _heat(layers: Sequence[int], routers: Sequence[Facts], experts: Sequence[str]) -> Chart:
    """Load of every expert in every layer. Opacity shows the share, so it works on any background."""
    rows = [
        {
            "layer": facts["layer"], "expert": f"{index} {name}", "share": share,
            "description": f"layer {facts['layer']}, {name}: {share:.1%} of assignments",
            "short": "dead" if index in facts["load"]["dead"] else f"{100 * share:.0f}",
        }
        for facts in routers
        for index, (name, share) in enumerate(zip(experts, facts["load"]["share"], strict=True))
    ]  # fmt: skip
    caption = "Load: share of each layer's assignments by expert, in percent"
    names = [f"{index} {name}" for index, name in enumerate(experts)]

    def spec(width: int) -> Spec:
        cell = 24 if len(experts) <= 16 else 13
        rect: Spec = {
            "mark": {
                "type": "rect", "fill": "var(--heat)", "stroke": "var(--card)", "strokeWidth": 1,
                "aria": len(rows) <= DESCRIBED_CELLS,
            },
            "encoding": {
                "fillOpacity": {
                    "field": "share", "type": "quantitative", "legend": None,
                    "scale": {"domainMin": 0, "range": [0.03, 0.6]},
                },
                "description": {"field": "description"},
            },
        }  # fmt: skip
        room = width / len(layers) >= 26 and len(rows) <= LABELLED_CELLS
        text: Spec = {
            "mark": {"type": "text", "fontSize": 11, "aria": False},
            "encoding": {"text": {"field": "short"}},
        }
        return {
            "width": width, "height": cell * len(experts), "data": {"values": rows}, "description": caption,
            "encoding": {
                "x": {"field": "layer", "type": "ordinal", "axis": _layer_axis(layers), "title": "layer"},
                "y": {
                    "field": "expert", "type": "nominal", "sort": names, "title": None,
                    "axis": {"labelLimit": 110, "ticks": False, "domain": False},
                },
            },
            "layer": [rect, text] if room else [rect],
        }  # fmt: skip

    return Chart("load", caption, spec)


def _layer_axis(layers: Sequence[int]) -> Spec:
    step = max(1, len(layers) // 13)
    return {"labelAngle": 0, "values": list(layers[::step]), "ticks": False, "grid": False}
