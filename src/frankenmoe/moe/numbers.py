"""The types of stored numbers, for code that numba compiles; knows no vectors."""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

FLAGS = {"reassoc", "contract", "nsz"}  # sums in any order, as a vector needs; infinities and NaN stay what they are

HALF = np.uint32(0x3F000000)  # the bits of 0.5


def widened(number: Any) -> Any:
    """The float32 that bits stand for: uint16 those of a bf16, int16 those of an fp16; int8 and float32 are numbers."""
    raise NotImplementedError("for compiled code")


@overload(widened)
def _widened(number: Any) -> Any:
    return {types.uint16: _from_bf16, types.int16: _from_fp16, types.int8: _from_int8, types.float32: _itself}[number]


def _from_bf16(number: Any) -> Any:
    return np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _from_fp16(number: Any) -> Any:
    # exponent and fraction moved to their places in a float32; the factor is the difference of the two biases
    bits = np.uint32(np.uint16(number))
    sign, rest = np.uint32(bits & np.uint32(0x8000)), np.uint32(bits & np.uint32(0x7FFF))
    endless = np.uint32(0x7F800000) if rest >= np.uint32(0x7C00) else np.uint32(0)  # infinity and NaN
    moved = np.uint32(np.uint32(np.uint32(sign << np.uint32(16)) | np.uint32(rest << np.uint32(13))) | endless)
    return moved.view(np.float32) * np.float32(2.0**112)


def _from_int8(number: Any) -> Any:
    return np.float32(number)


def _itself(number: Any) -> Any:
    return number


def rounded(number: Any, like: Any) -> Any:
    """The bits of a float32 rounded to the nearest of the type of `like`, ties to even."""
    raise NotImplementedError("for compiled code")


@overload(rounded)
def _rounded(number: Any, like: Any) -> Any:
    return {types.uint16: _to_bf16, types.int16: _to_fp16, types.float32: _to_itself}[like]


def _to_bf16(number: Any, like: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):  # NaN, which the sum could turn into infinity
        return np.uint16(np.uint32(bits >> np.uint32(16)) | np.uint32(0x40))
    tie = np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + tie) >> np.uint32(16))


def _to_fp16(number: Any, like: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if size > np.uint32(0x7F800000):
        found = np.uint32(0x7E00)
    elif size >= np.uint32(0x477FF000):  # 65520, from where on infinity is nearest
        found = np.uint32(0x7C00)
    elif size >= np.uint32(0x38800000):  # 2**-14
        tie = np.uint32(0xFFF) + np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
        found = np.uint32(np.uint32(np.uint32(size + tie) >> np.uint32(13)) - np.uint32(112 << 10))
    else:  # the last bit of float32 at 0.5 is that of the smallest fp16
        found = np.uint32(np.float32(np.uint32(size).view(np.float32) + np.float32(0.5)).view(np.uint32) - HALF)
    return np.int16(np.uint16(sign | found))


def _to_itself(number: Any, like: Any) -> Any:
    return number
