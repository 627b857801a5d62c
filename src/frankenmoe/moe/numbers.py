"""The types of stored numbers and their exponential, for code that numba compiles; knows no vectors."""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

PLAIN = {"nogil": True, "error_model": "numpy"}  # without Python, and without its errors
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


# of e**r = 1 + r + r**2 * polynomial(r) for r from -log(2)/2 to log(2)/2: Moshier's Cephes, expf
FACTORS = tuple(
    map(
        np.float32, (1.98756915e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
)
LOG2_E, LOG_2 = np.float32(np.log2(np.e)), np.float32(np.log(2))
LEAST, MOST = np.float32(-87), np.float32(88)  # whose exponentials are normal numbers


@njit(**PLAIN)
def exponential(number: Any) -> Any:
    """e**number in float32, many at once where C's own function takes one; beyond the ends, their exponentials.

    Relative error 3e-7, at the ends 5e-6 where a CPU rounds between multiplying and adding.
    """
    within = min(max(number, LEAST), MOST)
    power = np.floor(within * LOG2_E + np.float32(0.5))
    rest = within - power * LOG_2
    a, b, c, d, e, f = FACTORS
    tail = ((((a * rest + b) * rest + c) * rest + d) * rest + e) * rest + f
    scale = np.uint32(np.uint32(np.int32(power) + np.int32(127)) << np.uint32(23)).view(np.float32)
    return (tail * rest * rest + rest + np.float32(1)) * scale
