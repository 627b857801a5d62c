"""A matrix that another program stored: its rows in float32, on demand, and how its type rounds. No torch.

Knows no file format and no model. Shape suffixes: R rows, C columns, N elements, L levels.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from frankenmoe.checkpoint.cast import Bytes, Floats, decode, encode
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import DTYPES, FLOATS, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks

CHUNK = 2**16  # elements that are compared at a time; as float32 they fit a CPU cache

Rows = Callable[[int, int], Floats]
"""(start, stop) -> the rows [stop - start, C]."""
Rounding = Callable[[Floats], Floats]
"""Rows -> what a type keeps of them."""


@dataclass(frozen=True)
class Stored:
    """How numbers are stored: `kind` for users, `rounded` for the error that it makes."""

    kind: str
    rounded: Rounding
    quantized: bool = True


@dataclass(frozen=True)
class Matrix:
    """`shape` is (R, C); tensors with more axes have their last one as C, vectors are one row."""

    name: str
    shape: tuple[int, int]
    stored: Stored
    rows: Rows

    def part(self, first: int, shape: tuple[int, int]) -> "Matrix":
        """`shape` of its numbers from row `first` on; columns beyond are left out."""
        columns = shape[1]

        def rows(start: int, stop: int) -> Floats:
            return self.rows(first + start, first + stop)[:, :columns]

        return replace(self, shape=shape, rows=rows)

    def times(self, *, rows_R: Floats | None = None, columns_C: Floats | None = None) -> "Matrix":
        """Every row times its factor, and every column times its own; its type rounded the numbers before that."""
        by_row = np.ones(self.shape[0], np.float32) if rows_R is None else rows_R
        by_column = np.ones(self.shape[1], np.float32) if columns_C is None else columns_C

        def rows(start: int, stop: int) -> Floats:
            return np.asarray(self.rows(start, stop) * by_row[start:stop, None] * by_column, np.float32)

        def rounded(rows_RC: Floats) -> Floats:  # blocks lie within rows, whose factors round nothing
            return np.asarray(self.stored.rounded(rows_RC / by_column) * by_column, np.float32)

        return replace(self, rows=rows, stored=replace(self.stored, rounded=rounded))


def two_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, C) of a tensor."""
    return math.prod(shape[:-1]), (shape or (1,))[-1]


def plain(ref: TensorRef) -> Matrix:
    """A tensor of floats in a safetensors file."""
    shape = two_axes(ref.shape)
    width = shape[1] * DTYPES[ref.dtype].itemsize

    def rows(start: int, stop: int) -> Floats:
        raw = map_bytes(ref)[start * width : stop * width]
        return decode(raw, dtype=ref.dtype).reshape(stop - start, -1)

    return Matrix(ref.name, shape, Stored(ref.dtype, as_float(ref.dtype), quantized=False), rows)


def as_float(dtype: str) -> Rounding:
    """Rounding to a float type of safetensors."""
    return lambda rows_RC: decode(encode(np.ascontiguousarray(rows_RC).ravel(), dtype=dtype), dtype=dtype).reshape(
        rows_RC.shape
    )


def to_levels(levels_L: Floats) -> Rounding:
    """Rounding to the nearest of some numbers."""
    sorted_L = np.unique(levels_L[np.isfinite(levels_L)])
    between = (sorted_L[1:] + sorted_L[:-1]) / 2
    return lambda numbers: np.asarray(sorted_L[np.searchsorted(between, numbers)], np.float32)


def in_blocks(levels_L: Floats, block: int) -> Rounding:
    """Rounding of `block` numbers in a row to their largest magnitude times a level; levels are within -1 and 1."""
    nearest = to_levels(levels_L)

    def rounded(rows_RC: Floats) -> Floats:
        flat_N = np.pad(rows_RC.ravel(), (0, -rows_RC.size % block)).reshape(-1, block)
        most = np.abs(flat_N).max(axis=1, keepdims=True)
        found_N: Floats = nearest(flat_N / np.maximum(most, np.float32(1e-30))) * most
        return found_N.ravel()[: rows_RC.size].reshape(rows_RC.shape)

    return rounded


def to_grid(bits: int, group: int | None, *, symmetric: bool) -> Rounding:
    """Rounding to 2**bits equal steps between the ends of every `group` of columns, or of the whole row."""

    def rounded(rows_RC: Floats) -> Floats:
        rows, columns = rows_RC.shape
        size = group if group and columns % group == 0 else columns
        grouped = rows_RC.reshape(rows, -1, size)
        low, high = (each(grouped, axis=2, keepdims=True) for each in (np.min, np.max))
        if symmetric:
            high = np.maximum(np.abs(low), high)
            low = -high
        step = np.where(high > low, high - low, 1) / (2**bits - 1)
        found: Floats = (np.round((grouped - low) / step) * step + low).astype(np.float32)
        return found.reshape(rows, columns)

    return rounded


def our_chunks(write: TensorWrite, shape: tuple[int, int]) -> Iterator[tuple[int, int, Floats]]:
    """(start, stop, rows [stop - start, C]) of a tensor of ours, in order, about CHUNK numbers at a time."""
    rows, columns = shape
    width = columns * DTYPES[write.dtype].itemsize
    step = max(1, CHUNK // columns)
    rest, at = np.empty(0, np.uint8), 0
    for raw in blocks(write):
        rest = np.concatenate([rest, raw]) if rest.size else raw
        last = at + rest.size // width == rows
        whole = len(rest) // width if last else len(rest) // width // step * step
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            yield at + start, at + stop, _decoded(rest[start * width : stop * width], write.dtype).reshape(-1, columns)
        rest, at = rest[whole * width :], at + whole


def first_rows(write: TensorWrite, count: int) -> Floats:
    """The first `count` rows of a tensor of ours, or all if it has fewer."""
    shape = two_axes(write.shape)
    count = min(count, shape[0])
    found = np.empty((0, shape[1]), np.float32)
    for _, _, rows_RC in our_chunks(write, shape):
        found = np.concatenate([found, rows_RC])
        if len(found) >= count:
            break
    return found[:count]


def _decoded(raw: Bytes, dtype: str) -> Floats:
    """Numbers of any type; some families keep integers in their backbone."""
    return decode(raw, dtype=dtype) if dtype in FLOATS else raw.view(np.dtype(DTYPES[dtype].name)).astype(np.float32)
