"""The heat map is a PNG that a reader of PNGs reads, dark where the load is."""

import struct
import zlib

import numpy as np

from frankenmoe.publish.picture import CELL, MARGIN, PAPER, colour, heat_map


def decoded(data: bytes) -> np.ndarray:
    """The pixels of a PNG without filters, read by the standard's own rules, checksums too."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(name + content),)
        found[name] = content
        at += 12 + length
    assert list(found) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, kind = struct.unpack(">IIBB", found[b"IHDR"][:10])
    assert (depth, kind) == (8, 2)
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), dtype=np.uint8).reshape(height, 1 + width * 3)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_each_cell_has_the_colour_of_its_share() -> None:
    shares = [[0.5, 0.25, 0.25], [0.0, 0.1, 0.9]]
    image = decoded(heat_map(shares, layers=[0, 1]))
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            pixel = image[MARGIN + y * CELL + 3, MARGIN + x * CELL + 3]
            assert tuple(pixel) == colour(share / 0.9), (y, x)
    assert tuple(image[0, 0]) == PAPER


def test_more_is_darker() -> None:
    brightness = [sum(colour(step / 20)) for step in range(21)]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == len(brightness)


def test_sixty_four_experts_and_no_load_at_all() -> None:
    image = decoded(heat_map([[0.0] * 64] * 100, layers=range(100)))
    assert image.shape[0] > 100 * CELL
    assert image.shape[1] > 64 * CELL
