"""Normal noise of 16 bits a number: numpy's own, of 24 bits, takes five times as long.

Shape suffix: N elements of one block.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np

from frankenmoe.checkpoint.cast import Bytes, Floats
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite

MOST = 5.0  # standard deviations, rounded up: the largest of the quantiles is 4.3
_CHUNK = 2**17  # elements, which with their noise fit the CPU's cache
_LARGE = 2**22  # elements of a tensor that are worth loading the compiled kernel


@dataclass(frozen=True)
class AddNoise:
    """Adds normal noise of standard deviation `std` to blocks of numbers.

    The noise is keyed by seed and the block's number, so that any block can be computed alone, in any process.
    """

    std: float
    seed: int

    def __call__(self, block_N: Floats, number: int) -> Floats:
        """A block with its noise."""
        words_N = self._stream(number).random_raw(-(-block_N.size // 4)).view(np.uint16)[: block_N.size]
        scaled = self._scaled()
        out_N = np.empty_like(block_N)
        for start in range(0, block_N.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            scaled.take(words_N[part], out=out_N[part], mode="wrap")  # the mode "raise" would make a copy of `out`
            out_N[part] += block_N[part]
        return out_N

    def in_one_pass(self, source: TensorRef, target: TensorWrite) -> bool:
        """Whether `bfloat16` can make the target, and is worth it."""
        return source.dtype == target.dtype == "BF16" and source.numel >= _LARGE and _compiled() is not None

    def bfloat16(self, raw: Bytes, number: int) -> Bytes | None:
        """The bytes of a block of bfloat16 with its noise, rounded to bfloat16; None if a result is not finite."""
        compiled = _compiled()
        assert compiled is not None
        state = np.array(self._stream(number).state["state"]["state"], np.uint64)
        out = np.empty_like(raw)
        return out if compiled.add_noise(raw, out, self._scaled(), state) else None

    def _stream(self, number: int) -> np.random.SFC64:
        return np.random.SFC64(np.random.SeedSequence([self.seed, number]))

    def _scaled(self) -> Floats:
        with np.errstate(over="ignore"):  # the result is checked, where the element is known
            return _quantiles() * np.float32(self.std)


@cache
def _compiled() -> ModuleType | None:
    """The compiled kernel; None without numba (the extra `cpu`). numpy then computes the same."""
    try:
        from frankenmoe.checkpoint import noisekernel
    except ImportError:
        return None
    return noisekernel


@cache
def _quantiles() -> Floats:
    """The 65536 quantiles of the normal distribution in the middles of equal shares, with standard deviation 1."""
    from statistics import NormalDist  # slow to import, and few need it

    middles = (np.arange(2**16) + 0.5) / 2**16
    found = [NormalDist().inv_cdf(share) for share in middles.tolist()]
    std = math.sqrt(math.fsum(number * number for number in found) / len(found))  # the same sum on every machine
    return (np.array(found) / std).astype(np.float32)
