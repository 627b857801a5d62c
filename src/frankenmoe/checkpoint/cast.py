"""Converts bytes of float types to float32 numbers and back, bit for bit as torch does.

numpy has no bfloat16 and slow float16, so both use integer operations on chunks that fit the CPU cache. Scratch memory
is allocated once per call, because new memory costs more than the arithmetic.
Shape suffix: N elements.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.tensors import DTYPES

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# elements; fits the cache, and is large enough to leave Python's other threads time
_CHUNK = 2**18
_QUIET = np.uint32(0x0040_0000)
# corrects the exponent's bias (float16: 15, float32: 127) after shifting bits into place; also normalises subnormals
_REBIAS = np.float32(2.0**112)
_HALF_NUMBERS = 0x7C00  # larger magnitudes are infinite or NaN


@dataclass(frozen=True, slots=True)
class FloatBits:
    """A float type as integers. NaN and infinities have all bits of `exponent` set."""

    unsigned: type[np.unsignedinteger]
    signed: type[np.signedinteger]
    exponent: int
    largest: float


BITS: Mapping[str, FloatBits] = {
    "F64": FloatBits(np.uint64, np.int64, 0x7FF0_0000_0000_0000, float(np.finfo(np.float64).max)),
    "F32": FloatBits(np.uint32, np.int32, 0x7F80_0000, float(np.finfo(np.float32).max)),
    "F16": FloatBits(np.uint16, np.int16, _HALF_NUMBERS, 65504.0),
    "BF16": FloatBits(np.uint16, np.int16, 0x7F80, 2.0**127 * (2 - 2.0**-7)),
}


def decode(raw: Bytes, *, dtype: str) -> Floats:
    """float32 numbers from the bytes of a float type. F64 is rounded, all else is exact. May be a view of `raw`."""
    if dtype == "BF16":
        return _from_bfloat16(raw.view(np.uint16))
    if dtype == "F16":
        return _from_float16(raw.view(np.uint16))
    with np.errstate(over="ignore"):
        return raw.view(np.dtype(DTYPES[dtype].name)).astype(np.float32, copy=False)


def encode(numbers_N: Floats, *, dtype: str) -> Bytes:
    """The bytes of float32 numbers as `dtype`: rounds to nearest even, keeps NaN, overflows to infinity."""
    if dtype == "BF16":
        return _to_bfloat16(numbers_N).view(np.uint8)
    with np.errstate(over="ignore"):
        return numbers_N.astype(DTYPES[dtype].name, copy=False).view(np.uint8)


def first_nonfinite(raw: Bytes, *, dtype: str) -> int | None:
    """The flat index of the first NaN or infinity among floats of `dtype`, or None.

    Without its sign bit, a non-finite number is an integer of at least `exponent`. Two maxima find it without writing
    memory: the signed maximum finds positive ones, the unsigned maximum negative ones.
    """
    bits = BITS[dtype]
    negative = bits.exponent | 1 << (8 * DTYPES[dtype].itemsize - 1)
    whole = raw.view(bits.unsigned)
    for start in range(0, whole.size, _CHUNK):
        chunk = whole[start : start + _CHUNK]
        if chunk.max() >= negative or chunk.view(bits.signed).max() >= bits.exponent:
            return start + int(np.argmax((chunk & bits.unsigned(bits.exponent)) == bits.exponent))
    return None


def _from_bfloat16(codes_N: NDArray[np.uint16]) -> Floats:
    out_N = codes_N.astype(np.uint32)
    for start in range(0, out_N.size, _CHUNK):
        np.left_shift(out_N[start : start + _CHUNK], 16, out=out_N[start : start + _CHUNK])
    return out_N.view(np.float32)


def _from_float16(codes_N: NDArray[np.uint16]) -> Floats:
    out_N = np.empty(codes_N.size, np.float32)
    scratch_N = np.empty(min(codes_N.size, _CHUNK), np.uint32)
    for start in range(0, codes_N.size, _CHUNK):
        part_N = codes_N[start : start + _CHUNK]
        _widen(part_N, out_N=out_N[start : start + _CHUNK], scratch_N=scratch_N[: part_N.size])
    return out_N


def _widen(codes_N: NDArray[np.uint16], *, out_N: Floats, scratch_N: NDArray[np.uint32]) -> None:
    bits_N = out_N.view(np.uint32)
    np.copyto(bits_N, codes_N)
    np.bitwise_and(bits_N, 0x7FFF, out=scratch_N)
    if scratch_N.max() >= _HALF_NUMBERS:  # the factor is wrong for these; numpy is slow but right
        np.copyto(out_N, codes_N.view(np.float16))
        return
    np.left_shift(scratch_N, 13, out=scratch_N)
    magnitude_N = scratch_N.view(np.float32)
    np.multiply(magnitude_N, _REBIAS, out=magnitude_N)
    np.bitwise_and(bits_N, 0x8000, out=bits_N)
    np.left_shift(bits_N, 16, out=bits_N)
    np.bitwise_or(bits_N, scratch_N, out=bits_N)


def _to_bfloat16(numbers_N: Floats) -> NDArray[np.uint16]:
    out_N = np.empty(numbers_N.size, np.uint16)
    scratch_N = np.empty(min(numbers_N.size, _CHUNK), np.uint32)
    for start in range(0, numbers_N.size, _CHUNK):
        part_N = numbers_N[start : start + _CHUNK]
        _round(part_N, out_N=out_N[start : start + _CHUNK], scratch_N=scratch_N[: part_N.size])
    return out_N


def _round(numbers_N: Floats, *, out_N: NDArray[np.uint16], scratch_N: NDArray[np.uint32]) -> None:
    bits_N = numbers_N.view(np.uint32)
    # adding just under half of the last kept bit, plus that bit, carries exactly when rounding goes up
    np.right_shift(bits_N, 16, out=scratch_N)
    np.bitwise_and(scratch_N, 1, out=scratch_N)
    np.add(scratch_N, bits_N, out=scratch_N)
    np.add(scratch_N, 0x7FFF, out=scratch_N)
    if np.isnan(numbers_N.max()):  # the carry could change a NaN to infinity or zero
        quiet_N = np.isnan(numbers_N)
        scratch_N[quiet_N] = bits_N[quiet_N] | _QUIET
    np.right_shift(scratch_N, 16, out=scratch_N)
    np.copyto(out_N, scratch_N, casting="unsafe")
