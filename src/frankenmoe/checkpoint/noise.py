"""Normal noise of 16 bits a number: numpy's own, of 24 bits, takes five times as long.

Shape suffix: N elements of one block.
"""

import math
from functools import cache

import numpy as np

from frankenmoe.checkpoint.cast import Floats

MOST = 5.0  # standard deviations, rounded up: the largest of the quantiles is 4.3
_CHUNK = 2**17  # elements, which with their noise fit the CPU's cache


def add_noise(block_N: Floats, number: int, *, std: float, seed: int) -> Floats:
    """A block of numbers with normal noise of standard deviation `std`.

    The noise is keyed by seed and the block's number, so that any block can be computed alone, in any process.
    """
    random = np.random.SFC64(np.random.SeedSequence([seed, number]))
    words_N = random.random_raw(-(-block_N.size // 4)).view(np.uint16)[: block_N.size]
    scaled = _quantiles() * np.float32(std)
    out_N = np.empty_like(block_N)
    for start in range(0, block_N.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        scaled.take(words_N[part], out=out_N[part], mode="wrap")  # the mode "raise" would make a copy of `out`
        out_N[part] += block_N[part]
    return out_N


@cache
def _quantiles() -> Floats:
    """The 65536 quantiles of the normal distribution in the middles of equal shares, with standard deviation 1."""
    from statistics import NormalDist  # slow to import, and few need it

    middles = (np.arange(2**16) + 0.5) / 2**16
    found = [NormalDist().inv_cdf(share) for share in middles.tolist()]
    std = math.sqrt(math.fsum(number * number for number in found) / len(found))  # the same sum on every machine
    return (np.array(found) / std).astype(np.float32)
