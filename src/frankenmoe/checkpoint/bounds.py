"""Whether computed tensors are sure to be finite, known from the largest number of their source."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from frankenmoe.checkpoint import noise
from frankenmoe.checkpoint.cast import BITS, decode
from frankenmoe.checkpoint.reader import map_bytes, state_of
from frankenmoe.checkpoint.tensors import FLOATS, Noise, Scale, Shift, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import BLOCK

ROUNDING = 1.001
WIDEST = BITS["F32"].largest  # of the numbers on the way, whatever the types of source and result


def surely_fits(write: TensorWrite) -> bool:
    """Whether all results of `write` are finite and in the range of its type, by a bound on their size.

    False also where a bound is not known: then the results must be computed.
    """
    source = next(iter(write.inputs), None)
    if len(write.inputs) != 1 or not isinstance(source, TensorRef) or {source.dtype, write.dtype} - FLOATS:
        return False
    most = _largest(source, state_of(source))
    for step in write.steps:
        match step:
            case Scale(factor) if abs(factor) <= WIDEST:
                most *= abs(factor)
            case Shift(amount):
                most += abs(amount)
            case Noise(std, relative, _):  # the deviation of numbers is at most the largest of them
                most += noise.MOST * std * (most if relative else 1.0)
            case _:
                return False
        if not most * ROUNDING <= WIDEST:  # as for NaN
            return False
    return most * ROUNDING <= BITS[write.dtype].largest


@lru_cache(maxsize=2**16)
def _largest(ref: TensorRef, _state: tuple[Path, int, int]) -> float:
    """The largest magnitude in a stored tensor; NaN if it holds NaN. Computed once for all tensors made from it."""
    numbers, step = map_bytes(ref), BLOCK * ref.nbytes // max(ref.numel, 1)
    parts = (decode(numbers[start : start + step], dtype=ref.dtype) for start in range(0, ref.nbytes, step or 1))
    return float(np.max([np.maximum(part.max(), -part.min()) for part in parts], initial=0.0))
