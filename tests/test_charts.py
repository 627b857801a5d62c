"""Drawing: three formats, the same bytes each time, and no label or limit that ends the process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from frankenmoe import charts
from frankenmoe.charts import ChartError, draw
from frankenmoe.evaluate.plot import Point, plot

ODD = "\x00\x1b\x0b\ufffe\ud800"


def spec(label: str) -> charts.Spec:
    return {
        "data": {"values": [{"name": label, "value": 1}]},
        "mark": "bar",
        "encoding": {"x": {"field": "name", "type": "nominal"}, "y": {"field": "value", "type": "quantitative"}},
    }


def test_the_three_formats() -> None:
    one, two = draw([spec("one"), spec("one")])
    assert one == two
    assert one.startswith(b"<svg")
    assert draw([spec("one")], form="png")[0].startswith(b"\x89PNG")
    assert draw([spec("one")], form="pdf")[0].startswith(b"%PDF")
    assert draw([]) == []


def test_characters_that_xml_lacks_are_replaced() -> None:
    drawn = draw([spec(f"a{character}b") for character in ODD])
    assert all("a\ufffdb" in svg.decode() for svg in drawn)
    assert draw([spec(f"a{ODD}b")], form="png")[0].startswith(b"\x89PNG")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "can_draw", lambda: False)
    with pytest.raises(ChartError) as caught:
        draw([spec("one")])
    assert caught.value.hint == "pip install 'frankenmoe[audit]'"


def test_a_crash_is_an_error_with_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "NOT_XML", re.compile("(?!)"))
    with pytest.raises(ChartError, match="it was ended by SIG"):
        draw([spec("one"), spec("a\x1bb")])


def test_a_specification_that_is_none_is_an_error_with_its_reason() -> None:
    with pytest.raises(ChartError, match="failed: Vega-Lite to SVG"):
        draw([{"mark": "no such mark"}])


def test_little_address_space_is_an_error_too(tmp_path: Path) -> None:
    code = (
        "import resource\nfrom frankenmoe import charts\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)\n"
        "try:\n    charts.draw([{'data': {'values': [{'a': 1}]}, 'mark': 'bar'}])\n"
        "except charts.ChartError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the drawing library 'vl_convert' failed: it was ended by SIG" in done.stdout
    assert "hint: check `ulimit -v`" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_working_folder_that_is_gone_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert draw([spec("one")])


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.pdf"])
def test_the_plot_of_models_with_odd_names(name: str, tmp_path: Path) -> None:
    points = [Point(f"m{ODD}", "moe", 10**6, 1.0, 0.9, 1.1), Point("b", "base", 10**5, 0.5, 0.4, 0.6)]
    plot(points, tmp_path / name, quality="loss")
    assert (tmp_path / name).stat().st_size > 1000
