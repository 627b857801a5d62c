"""Draws a table of loads as a PNG heat map: a row per layer, a column per expert."""

from collections.abc import Sequence

from frankenmoe.charts import INK, Spec, draw

CELL = 28  # pixels
NUMBERED_CELLS = 1024  # more get no percentages: nobody reads so many
DARK = 0.6  # of the largest share: from here on the numbers are white
# light to dark blue, readable in grey and by colour-blind eyes
COLOURS = ["#F7FBFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B"]


def heat_map(share_LE: Sequence[Sequence[float]], *, layers: Sequence[int], experts: Sequence[str]) -> bytes:
    """The PNG. Raises ChartError."""
    return draw([chart(share_LE, layers=layers, experts=experts)], form="png")[0]


def chart(share_LE: Sequence[Sequence[float]], *, layers: Sequence[int], experts: Sequence[str]) -> Spec:
    """The Vega-Lite specification. The darkest cell has the largest share; `layers` and `experts` are the labels."""
    names = [f"{index} {name}" for index, name in enumerate(experts)]
    most = max(max(row) for row in share_LE) or 1.0
    rows = [
        {"layer": layer, "expert": name, "share": share, "percent": f"{100 * share:.0f}"}
        for layer, shares in zip(layers, share_LE, strict=True)
        for name, share in zip(names, shares, strict=False)
    ]
    colour = {
        "field": "share", "type": "quantitative",
        "scale": {"domain": [0, most], "range": COLOURS},
        "legend": {
            "title": "share of tokens", "format": ".0%", "values": [0, most / 2, most],
            "gradientLength": min(120, CELL * len(layers) + 20),
        },
    }  # fmt: skip
    cells: Spec = {
        "mark": {"type": "rect", "stroke": "white", "strokeWidth": 2},
        "encoding": {"color": colour},
    }
    numbers: Spec = {
        "mark": {"type": "text", "fontSize": 11},
        "encoding": {
            "text": {"field": "percent"},
            "color": {"condition": {"test": f"datum.share > {DARK * most}", "value": "white"}, "value": INK},
        },
    }
    return {
        "width": {"step": CELL}, "height": {"step": CELL}, "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "expert", "type": "nominal", "sort": names, "title": "expert",
                "axis": {"orient": "top", "labelAngle": -45, "labelLimit": 140, "ticks": False, "domain": False},
            },
            "y": {
                "field": "layer", "type": "ordinal", "title": "layer",
                "axis": {"ticks": False, "domain": False, "labelOverlap": True},
            },
        },
        "layer": [cells, numbers] if len(rows) <= NUMBERED_CELLS else [cells],
    }  # fmt: skip
