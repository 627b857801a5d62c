"""Merges of tensors, elementwise and block by block, with the meaning that mergekit 0.1.5 gives each method.

An input is a function that starts to read it from its first block, so methods can read their inputs several times: for
norms, thresholds and factors of the whole tensor. The arithmetic is mergekit's on float32 tensors, in its order, so
that its results and ours differ at most in the last bits of a float32. Nothing held grows with the tensor.
Shape suffix: N elements of one chunk, or of one block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import Merge

Blocks = Callable[[], Iterator[Floats]]
"""Starts to read a tensor; yields its blocks of float32 numbers in order."""

Combine = Callable[[Sequence[Floats], int, int], Floats]
"""(a chunk of every input, the block's number, the chunk's start in the block) -> that chunk of the merge. Chunks come
in order, and the chunk returned may be overwritten by the next call."""

Prepare = Callable[[Merge, Sequence[Blocks]], Callable[[], Combine]]
"""Reads what it needs of the inputs, then gives a function that starts a merge."""

_CHUNK = 2**15  # elements; a few of them fit the CPU's cache


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
    total = sum(merge.weights)
    sum_N, term_N = np.empty(_CHUNK), np.empty(_CHUNK)

    def combine(chunk: Sequence[Floats], _number: int, _start: int) -> Floats:
        size = chunk[0].size
        np.multiply(chunk[0], merge.weights[0], out=sum_N[:size])
        for part_N, weight in zip(chunk[1:], merge.weights[1:], strict=True):
            np.multiply(part_N, weight, out=term_N[:size])
            sum_N[:size] += term_N[:size]
        sum_N[:size] /= total
        return sum_N[:size].astype(np.float32)

    return lambda: combine


def _differences(merge: Merge, _: Sequence[Blocks]) -> Callable[[], Combine]:
    """base + scale * sum_i w_i (x_i - base), not normalised (task arithmetic, Ilharco 2023, 2212.04089)."""
    weights = np.array(merge.weights, np.float32)
    scale = np.float32(merge.scale)

    def combine(chunk: Sequence[Floats], _number: int, _start: int) -> Floats:
        base_N, *parents = chunk
        sum_N = np.zeros_like(base_N)
        for parent_N, weight in zip(parents, weights, strict=True):
            difference_N = parent_N - base_N
            difference_N *= weight
            sum_N += difference_N
        sum_N *= scale
        sum_N += base_N
        return sum_N

    return lambda: combine


METHODS: Mapping[str, Prepare] = {
    "average": _average,
    "task_arithmetic": _differences,
}
