"""The numbers of tensors: decode, compute, encode, check.

Works in blocks of 2**20 elements in flat (row-major) order, so memory does not grow with the tensor.
Shape suffixes: N elements of one block, O rows (out) and I columns (in) of a matrix, R rank of a low-rank term.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from frankenmoe.checkpoint.cast import BITS, Bytes, Floats, decode, encode, first_nonfinite
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import (
    DTYPES,
    FLOATS,
    Constant,
    LowRank,
    Mean,
    Noise,
    Scale,
    Step,
    TensorRef,
    TensorWrite,
)
from frankenmoe.errors import NumericsError, SourceError

Stage = Callable[[Floats, int], Floats]
"""A prepared step: takes a block and its number, returns the block after the step, does not change its input."""

BLOCK = 2**20  # elements; also keys the noise, so another value gives other noise


def values(ref: TensorRef) -> Floats:
    """The numbers of a small tensor in its own shape. Raises SourceError for types that are not floats."""
    _require_float(ref)
    return decode(map_bytes(ref), dtype=ref.dtype).reshape(ref.shape).copy()


def blocks(write: TensorWrite) -> Iterator[Bytes]:
    """The output bytes of `write` in order, one array per 2**20 elements. Read-only: copies are mapped views.

    Raises while iterating: SourceError for types that are not floats, NumericsError for NaN or infinity in a source and
    for results out of the range of `write.dtype`.
    """
    if write.is_copy:
        yield from _copied_blocks(write)
        return
    _require_castable(write)
    for number, block_N in enumerate(_floats(write, write.steps)):
        raw = encode(block_N, dtype=write.dtype)
        bad = first_nonfinite(raw, dtype=write.dtype)
        if bad is not None:
            raise _no_number(write, value=float(block_N[bad]), flat=number * BLOCK + bad)
        yield raw


def materialize(write: TensorWrite) -> Bytes:
    """The whole output of `write` [nbytes], the same bytes that `blocks` gives.

    A copy is the mapped source itself, unread and unchecked (see `check_finite`).
    """
    if write.is_copy:
        return map_bytes(write.inputs[0])
    out = np.empty(write.nbytes, np.uint8)
    cursor = 0
    for raw in blocks(write):
        out[cursor : cursor + raw.size] = raw
        cursor += raw.size
    return out


def check_finite(ref: TensorRef) -> None:
    """Raises NumericsError if a float tensor holds NaN or infinity. Other types pass."""
    if ref.dtype not in FLOATS:
        return
    raw = map_bytes(ref)
    flat = first_nonfinite(raw, dtype=ref.dtype)
    if flat is not None:
        value = decode(_elements(raw, flat, flat + 1, dtype=ref.dtype), dtype=ref.dtype)[0]
        raise NumericsError(
            f"tensor {ref.name!r} in {ref.file} holds {_spell(value)} at {_index(flat, ref.shape)}, "
            "expected finite numbers only",
            hint="the source is broken; fetch it again or use another one",
        )


def _copied_blocks(write: TensorWrite) -> Iterator[Bytes]:
    source = write.inputs[0]
    raw = map_bytes(source)
    for start in range(0, write.numel, BLOCK):
        block = _elements(raw, start, start + BLOCK, dtype=write.dtype)
        if write.dtype in FLOATS and first_nonfinite(block, dtype=write.dtype) is not None:
            check_finite(source)
        yield block


def _require_castable(write: TensorWrite) -> None:
    for ref in write.sources:
        _require_float(ref)
    if write.dtype not in FLOATS:
        raise SourceError(
            f"tensor {write.name!r} is to be written as {write.dtype}, expected one of {', '.join(sorted(FLOATS))}",
            hint="tensors that are not floats can be copied, not computed",
        )


def _require_float(ref: TensorRef) -> None:
    if ref.dtype not in FLOATS:
        raise SourceError(
            f"tensor {ref.name!r} in {ref.file} has dtype {ref.dtype}, expected one of {', '.join(sorted(FLOATS))}",
            hint="use the unquantized checkpoint as the source",
        )


def _floats(write: TensorWrite, steps: Sequence[Step]) -> Iterator[Floats]:
    """The blocks of `write` after `steps`, a prefix of its steps."""
    stages = [_stage(write, number) for number in range(len(steps))]
    inputs = [(map_bytes(ref), ref.dtype) for ref in write.inputs]
    for number, start in enumerate(range(0, write.numel, BLOCK)):
        stop = min(start + BLOCK, write.numel)
        decoded = [decode(_elements(raw, start, stop, dtype=dtype), dtype=dtype) for raw, dtype in inputs]
        block_N = _mean(decoded) if decoded else np.empty(stop - start, np.float32)
        yield _apply(stages, block_N=block_N, number=number)


@np.errstate(over="ignore", invalid="ignore")  # the result is checked, where the element is known
def _apply(stages: Sequence[Stage], *, block_N: Floats, number: int) -> Floats:
    for stage in stages:
        block_N = stage(block_N, number)
    return block_N


def _mean(decoded: Sequence[Floats]) -> Floats:
    if len(decoded) == 1:
        return decoded[0]
    total_N = decoded[0].astype(np.float64)
    for block_N in decoded[1:]:
        total_N += block_N
    return (total_N / len(decoded)).astype(np.float32)


def _stage(write: TensorWrite, number: int) -> Stage:
    match write.steps[number]:
        case Mean():  # done while decoding
            return lambda block_N, _: block_N
        case Constant(value):
            return lambda block_N, _: np.full_like(block_N, value)
        case Scale(factor):
            return lambda block_N, _: block_N * np.float32(factor)
        case Noise(std, relative, seed):
            unit = _std(write, write.steps[:number]) if relative else 1.0
            return partial(_add_noise, std=std * unit, seed=seed)
        case LowRank(a, b, scale):
            return partial(_add_low_rank, b_OR=values(b), a_RI=values(a) * np.float32(scale))


def _add_noise(block_N: Floats, number: int, *, std: float, seed: int) -> Floats:
    # keyed by block, so that any block can be computed alone, in any process
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
    return block_N + np.float32(std) * generator.standard_normal(block_N.size, np.float32)


def _add_low_rank(block_N: Floats, number: int, *, b_OR: Floats, a_RI: Floats) -> Floats:
    """Add the part of `b_OR @ a_RI` that a block covers, computing only the rows that it touches."""
    columns = a_RI.shape[1]
    start = number * BLOCK
    first_row, skipped = divmod(start, columns)
    last_row = math.ceil((start + block_N.size) / columns)
    rows = b_OR[first_row:last_row] @ a_RI
    return block_N + rows.ravel()[skipped : skipped + block_N.size]


def _std(write: TensorWrite, steps: Sequence[Step]) -> float:
    """The population standard deviation of `write` after `steps`, in one pass (Chan, Golub and LeVeque 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for block_N in _floats(write, steps):
        wide_N = block_N.astype(np.float64)
        block_mean = float(wide_N.mean())
        shift = block_mean - mean
        squares += float(np.square(wide_N - block_mean).sum()) + shift**2 * count * wide_N.size / (count + wide_N.size)
        count += wide_N.size
        mean += shift * wide_N.size / count
    return math.sqrt(squares / count) if count else 0.0


def _elements(raw: Bytes, start: int, stop: int, *, dtype: str) -> Bytes:
    itemsize = DTYPES[dtype].itemsize
    return raw[start * itemsize : stop * itemsize]


def _no_number(write: TensorWrite, *, value: float, flat: int) -> NumericsError:
    """The error for a non-finite element `flat`: raised if a source is not finite, else returned as an overflow."""
    for ref in write.sources:
        check_finite(ref)
    files = ", ".join(sorted({str(ref.file) for ref in write.sources})) or "a constant"
    return NumericsError(
        f"tensor {write.name!r} from {files} becomes {value:g} at {_index(flat, write.shape)}, "
        f"but {write.dtype} holds at most {BITS[write.dtype].largest:g}",
        hint="choose a dtype with a wider range: bfloat16 or float32",
    )


def _spell(value: np.float32) -> str:
    return "NaN" if np.isnan(value) else "-Inf" if value < 0 else "Inf"


def _index(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(place) for place in np.unravel_index(flat, shape)])
