"""A table of loads as a small PNG: a row per layer, a column per expert; knows nothing of models or cards."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CELL = 22  # pixels
MARGIN = 30
GAP = 2
# digits as three columns by five rows
DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001001001", "111101111101111", "111101111001111",
)  # fmt: skip
INK = (70, 70, 70)
PAPER = (255, 255, 255)
# light to dark blue, which reads the same in grey and to colour-blind eyes
SCALE = np.array([(247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], dtype=np.float64)

Image = NDArray[np.uint8]


def heat_map(share_LE: Sequence[Sequence[float]], *, layers: Sequence[int]) -> bytes:
    """The PNG: darkest where an expert gets the largest share found anywhere, white where it gets nothing.

    `layers` are the numbers on the left; the numbers above are the experts'.
    """
    rows, columns = len(share_LE), len(share_LE[0])
    most = max(max(row) for row in share_LE) or 1.0
    image = np.full((MARGIN + rows * CELL + GAP, MARGIN + columns * CELL + GAP, 3), PAPER, dtype=np.uint8)
    every = 1 if rows <= 40 else 5
    for y, row in enumerate(share_LE):
        if y % every == 0:
            _number(image, layers[y], top=MARGIN + y * CELL + 6, right=MARGIN - 4)
        for x, share in enumerate(row):
            top, left = MARGIN + y * CELL, MARGIN + x * CELL
            image[top : top + CELL - GAP, left : left + CELL - GAP] = colour(share / most)
    for x in range(columns):
        _number(image, x, top=MARGIN - 16, right=MARGIN + x * CELL + CELL - 5)
    return png(image)


def colour(value: float) -> tuple[int, int, int]:
    """0 to 1 as a colour between SCALE's steps."""
    place = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    red, green, blue = SCALE[low] + (SCALE[low + 1] - SCALE[low]) * (place - low)
    return round(red), round(green), round(blue)


def _number(image: Image, number: int, *, top: int, right: int, scale: int = 2) -> None:
    """Draws a number that ends at the column `right`."""
    for place, digit in enumerate(reversed(str(number))):
        glyph = np.array([int(bit) for bit in DIGITS[int(digit)]], dtype=bool).reshape(5, 3)
        drawn = glyph.repeat(scale, axis=0).repeat(scale, axis=1)
        left = right - (place + 1) * 4 * scale + scale
        if left >= 0:
            image[top : top + 5 * scale, left : left + 3 * scale][drawn] = INK


def png(image: Image) -> bytes:
    """An RGB image [height, width, 3] as a PNG file (ISO/IEC 15948): header, one compressed block, end."""
    height, width, _ = image.shape
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), image.reshape(height, width * 3)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    blocks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_block(name, data) for name, data in blocks)


def _block(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
