"""Draws Vega-Lite specifications as SVG, PNG or PDF without a network. Needs the extra `audit`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from frankenmoe.errors import PlanError

Spec = dict[str, Any]

EXTRA = "pip install 'frankenmoe[audit]'"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
PIXELS = 2.0  # of a PNG for each pixel of a specification, so that it is sharp on dense screens
INK, PALE = "#333333", "#DDDDDD"
# the look of a picture that stands alone on white paper
PAPER: Spec = {
    "background": "white",
    "padding": 12,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": INK, "gridColor": PALE, "domainColor": PALE, "tickColor": PALE,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
    },
    "legend": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
    "text": {"fill": INK},
}  # fmt: skip
# Characters outside XML 1.0's `Char`. One of them in a label aborts the whole process inside vl_convert.
NOT_XML = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def can_draw() -> bool:
    """Whether the drawing library vl_convert is installed."""
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        return False
    return True


def check_drawing() -> None:
    """PlanError if the drawing library is missing."""
    if not can_draw():
        raise PlanError("drawing needs the library 'vl_convert', which is not installed", hint=EXTRA)


def svg(spec: Spec, *, look: Spec = PAPER) -> str:
    """The chart as an SVG element."""
    check_drawing()
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(_complete(spec, look))
    return drawn


def png(spec: Spec, *, look: Spec = PAPER) -> bytes:
    """The chart as a PNG file."""
    check_drawing()
    import vl_convert

    drawn: bytes = vl_convert.vegalite_to_png(_complete(spec, look), scale=PIXELS)
    return drawn


def pdf(spec: Spec, *, look: Spec = PAPER) -> bytes:
    """The chart as a PDF file."""
    check_drawing()
    import vl_convert

    drawn: bytes = vl_convert.vegalite_to_pdf(_complete(spec, look))
    return drawn


def _complete(spec: Spec, look: Spec) -> str:
    return json.dumps(_printable({"$schema": SCHEMA, "config": look, **spec}))


def _printable(value: Any) -> Any:
    """The same data, each character that XML lacks replaced by U+FFFD."""
    if isinstance(value, str):
        return NOT_XML.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(each) for each in value]
    return value
