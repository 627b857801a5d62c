"""Draws Vega-Lite specifications as SVG, PNG or PDF without a network. Needs the extra `audit`.

The drawing library contains a JavaScript engine that ends its process when it fails, for example where address space is
limited. So it runs in a child process, which is this module as a program.
"""

import base64
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from frankenmoe.child import limit, program
from frankenmoe.errors import PlanError, first_line

Spec = dict[str, Any]

EXTRA = "pip install 'frankenmoe[audit]'"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
PATIENCE = 600  # seconds for all charts of a page, which take about five
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
# Characters outside XML 1.0's `Char`. One of them in a label makes vl_convert abort.
NOT_XML = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class ChartError(PlanError):
    """Charts cannot be drawn: the drawing library is missing, or it failed."""


def can_draw() -> bool:
    """Whether the drawing library vl_convert is installed."""
    return importlib.util.find_spec("vl_convert") is not None


def check_drawing() -> None:
    """ChartError if the drawing library is missing."""
    if not can_draw():
        raise ChartError("drawing needs the library 'vl_convert', which is not installed", hint=EXTRA)


def draw(specs: Sequence[Spec], *, form: str = "svg", look: Spec = PAPER) -> list[bytes]:
    """The charts as files of a form: svg, png or pdf. All are drawn by one child process. Raises ChartError."""
    check_drawing()
    if not specs:
        return []
    job = {"form": form, "charts": [_complete(spec, look) for spec in specs]}
    try:
        done = subprocess.run(
            **program(__name__), input=json.dumps(job).encode(), capture_output=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise _failed(f"it took more than {PATIENCE} seconds") from None
    except OSError as error:
        raise _failed(f"it cannot be started: {error.strerror}") from error
    if done.returncode:
        raise _ended(done.returncode, done.stderr.decode(errors="replace"))
    return [base64.b64decode(drawn) for drawn in json.loads(done.stdout)]


def _failed(why: str, *, hint: str | None = None) -> ChartError:
    return ChartError(f"the drawing library 'vl_convert' failed: {why}"[:300], hint=hint)


def _ended(code: int, said: str) -> ChartError:
    """How the child process ended: by a signal, or with a sentence of its own."""
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return _failed(said.strip() or f"exit status {code}")
    hint = "check `ulimit -v`: the library reserves many gigabytes of address space, though it does not use them"
    return _failed(f"it was ended by {name}", hint=hint)


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


def _serve() -> None:
    """The child process: a job on stdin, the drawings in base64 on stdout."""
    import vl_convert

    limit({"RLIMIT_CORE": 0})
    job = json.load(sys.stdin)
    options = {"scale": PIXELS} if job["form"] == "png" else {}
    convert: Callable[..., str | bytes] = getattr(vl_convert, f"vegalite_to_{job['form']}")
    try:
        made = [convert(chart, **options) for chart in job["charts"]]
    except ValueError as error:
        raise SystemExit(first_line(error)) from None
    drawn = [base64.b64encode(each.encode() if isinstance(each, str) else each).decode() for each in made]
    json.dump(drawn, sys.stdout)


if __name__ == "__main__":
    _serve()
