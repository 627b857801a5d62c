"""The heat map of loads: every cell has its share, more load is darker, and the file is a PNG."""

import re
import struct

from frankenmoe.charts import draw
from frankenmoe.publish.picture import CELL, chart, heat_map

SHARES = [[0.5, 0.25, 0.25], [0.0, 0.1, 0.9]]
LABELS = {"layers": [0, 1], "experts": ["maths", "law", "verse"]}


def cells(drawn: str) -> list[tuple[int, int]]:
    """(share in percent, brightness 0 to 765) of every cell of the drawing."""
    found = []
    for tag in re.findall(r"<path [^>]*aria-label=\"[^\"]*\"[^>]*>", drawn):
        share = re.search(r"share: (\d+)%", tag)
        fill = re.search(r'fill="rgb\((\d+), (\d+), (\d+)\)"', tag)
        if share and fill:
            found.append((int(share[1]), sum(map(int, fill.groups()))))
    return found


def test_more_load_is_darker() -> None:
    found = sorted(cells(draw([chart(SHARES, **LABELS)])[0].decode()))
    assert [share for share, _ in found] == sorted(100 * share for row in SHARES for share in row)
    brightness = [bright for _, bright in found]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == len({share for share, _ in found})


def test_layers_and_experts_are_named() -> None:
    drawn = draw([chart(SHARES, **LABELS)])[0].decode()
    assert all(f">{label}</text>" in drawn for label in ("layer", "expert", "0 maths", "1 law", "2 verse", "90"))


def test_sixty_four_experts_without_any_load() -> None:
    png = heat_map([[0.0] * 64] * 40, layers=range(40), experts=["same"] * 64)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 64 * CELL
    assert height > 40 * CELL
