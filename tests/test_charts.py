"""Drawing: three formats, the same bytes each time, and no label that ends the process."""

import pytest

from frankenmoe import charts
from frankenmoe.errors import PlanError


def spec(label: str) -> charts.Spec:
    return {
        "data": {"values": [{"name": label, "value": 1}]},
        "mark": "bar",
        "encoding": {"x": {"field": "name", "type": "nominal"}, "y": {"field": "value", "type": "quantitative"}},
    }


def test_the_three_formats() -> None:
    assert charts.svg(spec("one")) == charts.svg(spec("one"))
    assert charts.svg(spec("one")).startswith("<svg")
    assert charts.png(spec("one")).startswith(b"\x89PNG")
    assert charts.pdf(spec("one")).startswith(b"%PDF")


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x0b", "\ufffe", "\ud800"])
def test_characters_that_xml_lacks_are_replaced(character: str) -> None:
    assert "a\ufffdb" in charts.svg(spec(f"a{character}b"))
    assert charts.png(spec(f"a{character}b")).startswith(b"\x89PNG")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "can_draw", lambda: False)
    with pytest.raises(PlanError) as caught:
        charts.svg(spec("one"))
    assert caught.value.hint == "pip install 'frankenmoe[audit]'"
