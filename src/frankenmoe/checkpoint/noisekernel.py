"""bfloat16 numbers plus noise, rounded to bfloat16, in one pass that numba compiles.

Draws the same words as numpy's SFC64 (Doty-Humphrey's small fast counting generator), whose round is written out here.
numba widens sums of 32 bits to 64, which LLVM does not vectorize. So every result is cast.

Raises ImportError if numba is missing or switched off. Shape suffix: N elements of one block.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from frankenmoe.checkpoint.cast import Bytes, Floats
from frankenmoe.jit import PLAIN, compiled, require

require()
QUANTILES = 2**16
CHUNK = 4096  # numbers whose noise is kept in the CPU's first cache; a slice of it is vectorized
INFINITE = np.uint32(0x7F7F_8000)  # bits of a float32: from here on, bfloat16 is infinite or no number
U32, U64 = np.uint32, np.uint64
SIGNATURE = types.int64(
    types.CPointer(types.uint16),
    types.CPointer(types.uint16),
    types.int64,
    types.CPointer(types.float32),
    types.CPointer(types.uint64),
)


def add_noise(raw: Bytes, out: Bytes, quantiles: Floats, state: NDArray[np.uint64]) -> bool:
    """Writes the bfloat16 numbers in `raw`, each plus one of the 65536 quantiles, to `out`. False: one is not finite.

    `state` is that of an SFC64; every four numbers take one of its words, the lowest 16 bits first.
    """
    source, target, table, words = (each.ctypes.data for each in (raw, out, quantiles, state))
    return bool(_function()(source, target, raw.size // 2, table, words))


@cache
def _function() -> Any:
    kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
    return ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(compiled(_add_noise, SIGNATURE))


def _add_noise(source: Any, target: Any, size: int, table: Any, words: Any) -> int:
    """1 if all results are finite, else 0, which numba also returns for a call that failed."""
    source_N, target_N = carray(source, size), carray(target, size)
    quantiles, state = carray(table, QUANTILES), carray(words, 4)
    noise = np.empty(CHUNK, np.float32)
    finite = 1
    for start in range(0, size, CHUNK):
        _draw(noise, quantiles, state)
        finite &= _rounded_sums(source_N[start : start + CHUNK], target_N[start : start + CHUNK], noise)
    return finite


@njit(**PLAIN)
def _draw(noise: Any, quantiles: Any, state: Any) -> None:
    a, b, c, count = state
    low = U64(0xFFFF)
    for place in range(0, len(noise), 4):
        word = a + b + count
        count += U64(1)
        a = b ^ (b >> U64(11))
        b = c + (c << U64(3))
        c = ((c << U64(24)) | (c >> U64(40))) + word
        noise[place] = quantiles[word & low]
        noise[place + 1] = quantiles[(word >> U64(16)) & low]
        noise[place + 2] = quantiles[(word >> U64(32)) & low]
        noise[place + 3] = quantiles[word >> U64(48)]
    state[0], state[1], state[2], state[3] = a, b, c, count


@njit(**PLAIN)
def _rounded_sums(source_N: Any, target_N: Any, noise: Any) -> int:
    """Rounds to nearest even, as `cast` does. 1 if all results are finite, else 0."""
    largest = U32(0)
    for n in range(len(source_N)):
        bits = _bits(_number(U32(U32(source_N[n]) << U32(16))) + noise[n])
        odd = U32(U32(bits >> U32(16)) & U32(1))
        target_N[n] = U32(U32(bits + U32(0x7FFF)) + odd) >> U32(16)
        magnitude = U32(bits & U32(0x7FFF_FFFF))
        largest = max(magnitude, largest)
    return 1 if largest < INFINITE else 0


@intrinsic
def _number(typing: Any, bits: Any) -> Any:
    """A float32 of the same bits."""
    return types.float32(types.uint32), _cast


@intrinsic
def _bits(typing: Any, number: Any) -> Any:
    return types.uint32(types.float32), _cast


def _cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))
