"""Merges of tensors, elementwise and block by block, with the meaning that mergekit 0.1.5 gives each method.

An input is a function that starts to read it from its first block, so methods can read their inputs several times: for
norms, thresholds and factors of the whole tensor. The arithmetic is mergekit's on float32 tensors, in its order, so
that its results and ours differ at most in the last bits of a float32. Nothing held grows with the tensor.
Shape suffix: N elements of one chunk, or of one block.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import Merge

Blocks = Callable[[], Iterator[Floats]]
"""Starts to read a tensor; yields its blocks of float32 numbers in order."""

Combine = Callable[[Sequence[Floats], int, int], Floats]
"""(a chunk of every input, the block's number, the chunk's start in the block) -> that chunk of the merge. Chunks come
in order, and the chunk returned may be overwritten by the next call."""

Prepare = Callable[[Merge, Sequence[Blocks]], Callable[[], Combine]]
"""Reads what it needs of the inputs, then gives a function that starts a merge."""

Trimmed = Callable[[Floats, int, int], Floats]
"""(a chunk of a parent's difference from the base, which it may change, block, start) -> what is kept of it."""

Trim = Callable[[Merge, Sequence[Blocks]], Callable[[], Sequence[Trimmed]]]
"""Reads what it needs, then gives a function that starts to trim: one `Trimmed` per parent."""

Mix = Callable[[Sequence[Floats], Floats], tuple[Floats, Floats]]
"""(weighted differences, weights) -> (their mix, the weights in it)."""

_CHUNK = 2**15  # elements, an even number; a few chunks fit the CPU's cache
_HIGH, _LOW = 2**15, 2**16  # values of the high and low 16 bits of a magnitude
# mergekit's limits: below them norms and lengths count as zero, above it vectors as parallel
_SMALLEST_NORM, _SMALLEST_LENGTH = 1e-8, 1e-7
_PARALLEL = 0.9995


def merged(merge: Merge, inputs: Sequence[Blocks]) -> Blocks:
    """The merge of `inputs`. Statistics of whole tensors are computed here, once for all readings of the result."""
    with np.errstate(over="ignore", invalid="ignore"):  # who uses the numbers checks them
        begin = METHODS[merge.method](merge, inputs)

    def start() -> Iterator[Floats]:
        combine = begin()
        for number, blocks in enumerate(_side_by_side(inputs)):
            yield _combined(combine, blocks, number)

    return start


def _combined(combine: Combine, blocks: Sequence[Floats], number: int) -> Floats:
    out_N = np.empty_like(blocks[0])
    with np.errstate(over="ignore", invalid="ignore"):
        for start, chunk in _chunks(blocks):
            out_N[start : start + _CHUNK] = combine(chunk, number, start)
    return out_N


def _side_by_side(inputs: Sequence[Blocks]) -> Iterator[Sequence[Floats]]:
    return zip(*(start() for start in inputs), strict=True)


def _chunks(blocks: Sequence[Floats]) -> Iterator[tuple[int, Sequence[Floats]]]:
    for start in range(0, blocks[0].size, _CHUNK):
        yield start, [block_N[start : start + _CHUNK] for block_N in blocks]


def _average(merge: Merge, _: Sequence[Blocks]) -> Callable[[], Combine]:
    """sum_i w_i x_i / sum_i w_i, in float64: equal inputs give that input, bit for bit (Wortsman 2022, 2203.05482)."""
    share = 1 / sum(merge.weights)
    sum_N, term_N = np.empty(_CHUNK), np.empty(_CHUNK)

    def combine(chunk: Sequence[Floats], _number: int, _start: int) -> Floats:
        total_N, wide_N = sum_N[: chunk[0].size], term_N[: chunk[0].size]
        for index, (part_N, weight) in enumerate(zip(chunk, merge.weights, strict=True)):
            into_N = wide_N if index else total_N
            np.copyto(into_N, part_N)  # numpy converts whole chunks faster than operands
            if weight != 1:
                into_N *= weight
            if index:
                total_N += wide_N
        total_N *= share
        return total_N.astype(np.float32)

    return lambda: combine


def _slerp(merge: Merge, inputs: Sequence[Blocks]) -> Callable[[], Combine]:
    """Along the arc between two tensors as vectors (Shoemake 1985), or the line where they are nearly parallel.

    With theta the angle between them: sin((1 - t) theta) / sin(theta) x_0 + sin(t theta) / sin(theta) x_1.
    """
    squares_0 = squares_1 = product = 0.0
    for blocks in _side_by_side(inputs):
        for _, chunk in _chunks(blocks):
            zero_N, one_N = (part_N.astype(np.float64) for part_N in chunk)
            squares_0 += float(np.square(zero_N).sum())
            squares_1 += float(np.square(one_N).sum())
            product += float((zero_N * one_N).sum())
    norms = [norm if norm > _SMALLEST_NORM else 1.0 for norm in (math.sqrt(squares_0), math.sqrt(squares_1))]
    cosine = product / norms[0] / norms[1]
    first, second = 1 - merge.t, merge.t
    if abs(cosine) <= _PARALLEL:
        theta = math.acos(cosine)
        first, second = (math.sin(part * theta) / math.sin(theta) for part in (first, second))

    def combine(chunk: Sequence[Floats], _number: int, _start: int) -> Floats:
        return np.float32(first) * chunk[0] + np.float32(second) * chunk[1]

    return lambda: combine


def _differences(
    merge: Merge, inputs: Sequence[Blocks], *, trim: Trim, mix: Mix, normalize: bool = False
) -> Callable[[], Combine]:
    """base + scale * the mix of w_i * the trimmed (x_i - base), divided by the weights that were mixed if `normalize`.

    Task arithmetic (Ilharco 2023, arXiv 2212.04089) trims nothing and mixes by adding up.
    TIES (Yadav 2023, arXiv 2306.01708) keeps the largest differences, and mixes those with the elected sign.
    DARE (Yu 2024, arXiv 2311.03099) keeps random differences and rescales them; adding up, or with TIES' signs.
    """
    weights = np.array(merge.weights, np.float32)
    scale = np.float32(merge.scale)
    begin = (trim if merge.density < 1 else _whole)(merge, inputs)

    def combine(trims: Sequence[Trimmed], chunk: Sequence[Floats], number: int, start: int) -> Floats:
        base_N, *parents = chunk
        kept = [trimmed(parent_N - base_N, number, start) for trimmed, parent_N in zip(trims, parents, strict=True)]
        for difference_N, weight in zip(kept, weights, strict=True):
            if weight != 1:
                difference_N *= weight
        mixed_N, weight_N = mix(kept, weights)
        if normalize:
            weight_N[weight_N == 0] = 1
            mixed_N /= weight_N
        if scale != 1:
            mixed_N *= scale
        mixed_N += base_N
        return mixed_N

    return lambda: partial(combine, begin())


def _added(kept: Sequence[Floats], weights: Floats) -> tuple[Floats, Floats]:
    """(the sum, the sum of the weights)."""
    sum_N = kept[0] if len(kept) == 1 else kept[0] + kept[1]
    for part_N in kept[2:]:
        sum_N += part_N
    return sum_N, weights.sum(keepdims=True)


def _elected(kept: Sequence[Floats], weights: Floats) -> tuple[Floats, Floats]:
    """(the sum of those with the sign of the sum of all, the sum of their weights). The sign of zero is plus."""
    plus_N = _added(kept, weights)[0] >= 0
    sum_N, weight_N = np.zeros_like(kept[0]), np.zeros_like(kept[0])
    for part_N, weight in zip(kept, weights, strict=True):
        agrees_N = np.where(plus_N, part_N > 0, part_N < 0)
        sum_N += part_N * agrees_N  # a product, so that NaN and infinity stay to be found
        weight_N += weight * agrees_N
    return sum_N, weight_N


def _whole(merge: Merge, _: Sequence[Blocks]) -> Callable[[], Sequence[Trimmed]]:
    """Keeps every difference."""
    return lambda: [lambda difference_N, _number, _start: difference_N] * len(merge.weights)


def _largest(merge: Merge, inputs: Sequence[Blocks]) -> Callable[[], Sequence[Trimmed]]:
    """Keep the `density` share of each parent's differences with the largest magnitudes, and make the others zero.

    At least one is kept. Of equal magnitudes at the threshold the first in row-major order are kept, so that the share
    is exact; mergekit keeps as many, but which ones depends on torch's sort.
    The threshold is exact: two readings count the high, then the low 16 bits of the magnitudes, whose integers are in
    the order of the numbers.
    """
    count = len(merge.weights)
    high = np.zeros((count, _HIGH), np.int64)
    for index, magnitudes_N in _magnitudes(inputs):
        high[index] += np.bincount(magnitudes_N >> np.uint32(16), minlength=_HIGH)
    wanted = max(1, int(merge.density * int(high[0].sum())))
    tops = [_from_top(high[index], wanted) for index in range(count)]
    low = np.zeros((count, _LOW), np.int64)
    for index, magnitudes_N in _magnitudes(inputs):
        inside_N = magnitudes_N[magnitudes_N >> np.uint32(16) == tops[index][0]]
        low[index] += np.bincount(inside_N & np.uint32(_LOW - 1), minlength=_LOW)
    limits = []
    for index, (top, left) in enumerate(tops):
        bottom, equal = _from_top(low[index], left)
        every = int(low[index, bottom]) == equal
        limits.append((top << 16 | bottom, None if every else equal))
    return lambda: [_Largest(threshold, equal) for threshold, equal in limits]


def _magnitudes(inputs: Sequence[Blocks]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """(a parent's number, the bits of a chunk of the magnitudes of its differences from the base)."""
    for blocks in _side_by_side(inputs):
        for _, (base_N, *parents) in _chunks(blocks):
            for index, parent_N in enumerate(parents):
                yield index, _bits(parent_N - base_N)


def _bits(numbers_N: Floats) -> NDArray[np.uint32]:
    return numbers_N.view(np.uint32) & np.uint32(0x7FFF_FFFF)


def _from_top(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """(the bin that holds the `wanted`th largest value, how many of that bin are among the `wanted` largest)."""
    upwards = counts[::-1].cumsum()
    place = int(np.searchsorted(upwards, wanted))
    found = len(counts) - 1 - min(place, len(counts) - 1)
    return found, wanted - int(upwards[place - 1] if place else 0)


class _Largest:
    """Makes differences below a threshold zero; of those equal to it, the first `equal` stay (None: all)."""

    def __init__(self, threshold: int, equal: int | None) -> None:
        self._threshold = np.uint32(threshold)
        self._left = equal

    def __call__(self, difference_N: Floats, _number: int, _start: int) -> Floats:
        bits_N = _bits(difference_N)
        kept_N = bits_N >= self._threshold
        if self._left is not None:
            equal = np.flatnonzero(bits_N == self._threshold)
            kept_N[equal[self._left :]] = False
            self._left -= min(self._left, len(equal))
        difference_N *= kept_N
        return difference_N


def _random(merge: Merge, inputs: Sequence[Blocks]) -> Callable[[], Sequence[Trimmed]]:
    """Keep each difference with probability `density`, and rescale so that the sum of magnitudes stays (mergekit).

    The paper multiplies by 1 / density, which is the same in the mean; this keeps the length in small tensors too.
    """
    count = len(merge.weights)
    trims = [_Random(merge, index) for index in range(count)]
    before, after = np.zeros(count), np.zeros(count)
    for number, blocks in enumerate(_side_by_side(inputs)):
        for start, (base_N, *parents) in _chunks(blocks):
            for index, parent_N in enumerate(parents):
                difference_N = parent_N - base_N
                before[index] += np.abs(difference_N).sum(dtype=np.float64)
                after[index] += np.abs(trims[index](difference_N, number, start)).sum(dtype=np.float64)
    factors = [1.0 if min(was, now) < _SMALLEST_LENGTH else was / now for was, now in zip(before, after, strict=True)]
    return lambda: [_Random(merge, index, factor=factors[index]) for index in range(count)]


class _Random:
    """Keeps the differences whose random number is below `density`, times `factor`.

    The numbers are Philox's 32-bit words, keyed by seed and block, counted from the parent's number in the highest
    word: any block can be drawn alone, in any process and with any version of numpy.
    """

    def __init__(self, merge: Merge, parent: int, *, factor: float = 1.0) -> None:
        self._below = np.uint32(merge.density * 2**32)
        self._seed = merge.seed
        self._parent = parent
        self._factor = np.float32(factor)
        self._words = np.random.Philox(0)

    def __call__(self, difference_N: Floats, number: int, start: int) -> Floats:
        if start == 0:
            counter = np.array([0, 0, 0, self._parent], np.uint64)
            self._words = np.random.Philox(key=np.array([self._seed, number], np.uint64), counter=counter)
        words_N = self._words.random_raw(-(-difference_N.size // 2)).view(np.uint32)[: difference_N.size]
        difference_N *= words_N < self._below
        difference_N *= self._factor
        return difference_N


METHODS: Mapping[str, Prepare] = {
    "average": _average,
    "task_arithmetic": partial(_differences, trim=_whole, mix=_added),
    "ties": partial(_differences, trim=_largest, mix=_elected, normalize=True),
    "dare_linear": partial(_differences, trim=_random, mix=_added),
    "dare_ties": partial(_differences, trim=_random, mix=_elected),
    "slerp": _slerp,
}
