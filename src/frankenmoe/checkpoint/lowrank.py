"""The best low-rank approximation of the difference of two stored matrices, streamed from disk. Does not import torch.

Randomised subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1), and the exact
decomposition where it costs less. Memory grows with (outputs + inputs) x rank, not with the matrix.
Shape suffixes: O rows (out), I columns (in), S the shorter side, K columns of the sketch, R rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.cast import Floats, decode
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import DTYPES, TensorRef
from frankenmoe.checkpoint.values import check_finite
from frankenmoe.system import give_back_memory

Wide = NDArray[np.float64]
Basis = Callable[[int], Floats]
"""Count R -> the R leading right singular vectors as columns [I, R].

Their lengths need not be 1, and the caller may change the array.
"""

BLOCK = 2**20  # elements that are decoded at a time
KEPT = 2**24  # elements; a smaller difference stays in memory (64 MiB) between the passes
EXACT = 2048  # longest shorter side for the exact decomposition
CHEAP = 8  # sketches as wide as one 8th of the shorter side cost as much as the exact decomposition
SPARE = 16  # sketch columns beyond the rank; a flat spectrum needs more of them, so at least the rank is doubled
PASSES = 12  # at most so many power iterations
ENOUGH = 2e-4  # iterations end when the energy grows by less than this share
# both limits also bound the rank that an energy may ask for
SKETCH = 2**25  # numbers in the largest sketch (128 MiB)
WIDEST = 2048  # columns of the largest sketch
PANEL = 128  # columns that are worked on together where all of them would take much memory


@dataclass(frozen=True, slots=True)
class Difference:
    """`model` minus `base`: two float matrices [O, I] of the same shape, read in blocks of rows."""

    model: TensorRef
    base: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        rows, columns = self.base.shape
        return rows, columns

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """(rows, difference of these rows) from top to bottom."""
        rows, columns = self.shape
        step = max(1, BLOCK // columns)
        sides = [(map_bytes(ref), ref.dtype, DTYPES[ref.dtype].itemsize * columns) for ref in (self.model, self.base)]
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            ours, theirs = (decode(raw[start * size : stop * size], dtype=dtype) for raw, dtype, size in sides)
            yield slice(start, stop), (ours - theirs).reshape(-1, columns)


@dataclass(frozen=True, slots=True)
class Factors:
    """`b_OR @ a_RI`, close to a difference.

    Both factors carry the square roots of the singular values, so that their numbers have similar sizes. `energy` is
    the squared Frobenius norm of the difference, `kept` the part of it in the product.
    """

    a_RI: Floats
    b_OR: Floats
    energy: float
    kept: float

    @property
    def rank(self) -> int:
        return int(self.a_RI.shape[0])


def energies(model: TensorRef, base: TensorRef) -> tuple[float, float]:
    """The squared Frobenius norms of `model - base` and of `base`, of any shape; streamed in float64.

    Raises NumericsError if either holds NaN or infinity.
    """
    sums = np.zeros(2)
    sides = [(map_bytes(ref), ref.dtype, DTYPES[ref.dtype].itemsize) for ref in (model, base)]
    for start in range(0, base.numel, BLOCK):
        ours, theirs = (decode(raw[start * size : (start + BLOCK) * size], dtype=kind) for raw, kind, size in sides)
        for place, numbers in enumerate((ours - theirs, theirs)):
            sums[place] += np.square(numbers, dtype=np.float64).sum()
    if not np.isfinite(sums).all():
        check_finite(model)
        check_finite(base)
    return float(sums[0]), float(sums[1])


def low_rank(
    difference: Difference, *, total: float, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> Factors | None:
    """The best factors of a rank, or of the smallest rank that keeps the share `energy` of `total`.

    `total` is the difference's squared norm (`energies`). None if it is zero. The rank is at most the shorter side. The
    share is not reached if the sketch it needs would take more than SKETCH numbers or WIDEST columns. Memory: two
    sketches, a few WIDEST x WIDEST matrices, and 64 MiB; with a `rank`, two sketches of twice its columns.
    """
    if total <= 0:
        return None
    rows, columns = difference.shape
    short, sought = min(rows, columns), energy * total if energy is not None else math.inf
    kept_OI = _whole(difference) if rows * columns <= KEPT else None
    if kept_OI is not None and short <= EXACT and (rank is None or _columns(rank, short) * CHEAP >= short):
        values_K, basis_of = _exact(kept_OI)
    else:
        values_K, basis_of = _sketched(_passes(difference, kept_OI), difference.shape, rank, sought, seed)
    growing_K = np.cumsum(values_K)
    count = int(np.searchsorted(growing_K, sought)) + 1 if rank is None else rank
    count = max(1, min(count, values_K.size, int((values_K > 0).sum())))
    # directions beyond the difference's own rank are rounding errors, which need not be orthogonal to the others
    basis_IR = _orthonormal(basis_of(count))
    return _factors(_passes(difference, kept_OI), basis_IR, values_K[:count], rows=rows, total=total)


def _whole(difference: Difference) -> Floats:
    whole_OI = np.empty(difference.shape, np.float32)
    for rows, block_BI in difference.blocks():
        whole_OI[rows] = block_BI
    return whole_OI


def _passes(difference: Difference, kept_OI: Floats | None) -> Callable[[], Iterator[tuple[slice, Floats]]]:
    """A function that reads the difference once more from top to bottom."""
    if kept_OI is None:
        return difference.blocks
    step = max(1, BLOCK // kept_OI.shape[1])
    places = [slice(start, start + step) for start in range(0, kept_OI.shape[0], step)]
    return lambda: ((place, kept_OI[place]) for place in places)


def _exact(whole_OI: Floats) -> tuple[Wide, Basis]:
    """The squared singular values, the largest first, and a function that gives so many right singular vectors.

    From the eigenvectors of the smaller Gram matrix, in float64: exact to 1e-8 of the largest singular value.
    """
    tall = whole_OI.shape[0] >= whole_OI.shape[1]
    side = whole_OI if tall else whole_OI.T
    gram_SS = np.zeros((side.shape[1],) * 2)
    step = max(1, BLOCK // side.shape[1])
    for start in range(0, side.shape[0], step):
        part = side[start : start + step].astype(np.float64)
        gram_SS += part.T @ part
    values_S, vectors_SS = np.linalg.eigh(gram_SS)
    values_S, vectors_SS = np.maximum(values_S[::-1], 0.0), vectors_SS[:, ::-1].astype(np.float32)
    return values_S, lambda count: vectors_SS[:, :count].copy() if tall else whole_OI.T @ vectors_SS[:, :count]


def _columns(rank: int, short: int) -> int:
    """Sketch columns for a rank."""
    return min(short, max(2 * rank, rank + SPARE))


def _sketched(
    read: Callable[[], Iterator[tuple[slice, Floats]]],
    shape: tuple[int, int],
    rank: int | None,
    sought: float,
    seed: int,
) -> tuple[Wide, Basis]:
    """Leading squared singular values, and a function that gives their right singular vectors: subspace iteration.

    Every pass multiplies by the difference and by its transpose. With a rank, the sketch has a fixed width; without,
    it is doubled until its energy reaches `sought`.
    """
    rows, columns = shape
    short = min(shape)
    most = max(1, min(short, WIDEST, SKETCH // (rows + columns)))
    width = _columns(rank, short) if rank is not None else min(_columns(32, short), most)
    random = np.random.Generator(np.random.PCG64(seed))
    basis_IK = _orthonormal(random.standard_normal((columns, width), np.float32))
    while True:
        basis_IK, values_K = _iterated(read, basis_IK, wanted=rank or width // 2)
        # the second half of the sketch has not converged: it is only there to sharpen the first
        if rank is not None or width >= most or values_K[: width // 2].sum() >= sought:
            break
        more = min(2 * width, most) - width
        fresh_IK = random.standard_normal((columns, more), np.float32)
        basis_IK = _orthonormal(np.concatenate([basis_IK, fresh_IK], axis=1))
        width += more
    return values_K, lambda count: basis_IK[:, :count].copy()


def _iterated(
    read: Callable[[], Iterator[tuple[slice, Floats]]], basis_IK: Floats, *, wanted: int
) -> tuple[Floats, Wide]:
    """Power iterations until the energy of the first `wanted` directions hardly grows (Rayleigh-Ritz after each).

    The caller's basis is one of two arrays that are written in turns: a third one would take too much memory.
    """
    before, width = 0.0, basis_IK.shape[1]
    image_IK = np.empty_like(basis_IK)
    for number in range(PASSES + 1):
        image_IK[:] = 0
        gram_KK = np.zeros((width, width))
        for _, block_BI in read():
            product_BK = block_BI @ basis_IK
            gram_KK += product_BK.T @ product_BK
            for start in range(0, width, PANEL):  # a whole product would take as much memory as the image
                image_IK[:, start : start + PANEL] += block_BI.T @ product_BK[:, start : start + PANEL]
        give_back_memory()  # the next call needs the most
        values_K, turn_KK = np.linalg.eigh(gram_KK)
        values_K, turn_KK = np.maximum(values_K[::-1], 0.0), turn_KK[:, ::-1].astype(np.float32)
        now = float(values_K[:wanted].sum())
        if number == PASSES or now <= before * (1 + ENOUGH):
            return _turned(basis_IK, turn_KK), values_K
        before = now
        basis_IK, image_IK = _orthonormal(_turned(image_IK, turn_KK)), basis_IK
    raise AssertionError("the last pass returns")


def _turned(columns_IK: Floats, turn_KK: Floats) -> Floats:
    """`columns_IK @ turn_KK`, in place."""
    step = max(1, BLOCK // columns_IK.shape[1])
    for start in range(0, columns_IK.shape[0], step):
        columns_IK[start : start + step] = columns_IK[start : start + step] @ turn_KK
    return columns_IK


def _orthonormal(columns_IK: Floats) -> Floats:
    """The columns made orthonormal in place; each stays in the span of itself and of those before it.

    Gram-Schmidt by panels, each against the earlier ones and within itself, and both twice: what is left of a column
    that hardly differs from the earlier ones is mostly rounding errors after the first time (Giraud, Langou and
    Rozloznik 2005). numpy's QR of all columns would take eight times their memory.
    """
    for start in range(0, columns_IK.shape[1], PANEL):
        panel_IP, before_IK = columns_IK[:, start : start + PANEL].copy(), columns_IK[:, :start]
        for _ in range(2):
            lengths_P = np.linalg.norm(panel_IP, axis=0)
            panel_IP /= np.where(lengths_P > 0, lengths_P, 1)  # they may differ by many powers
            panel_IP -= before_IK @ (before_IK.T @ panel_IP)
            panel_IP = np.linalg.qr(panel_IP)[0]
        columns_IK[:, start : start + PANEL] = panel_IP
    return columns_IK


def _factors(
    read: Callable[[], Iterator[tuple[slice, Floats]]], basis_IR: Floats, values_R: Wide, *, rows: int, total: float
) -> Factors:
    """D V V^T as two factors with the square roots of the singular values in both."""
    roots_R = np.sqrt(np.sqrt(values_R)).astype(np.float32)
    roots_R = np.where(roots_R > 0, roots_R, 1)
    b_OR = np.empty((rows, basis_IR.shape[1]), np.float32)
    for place, block_BI in read():
        b_OR[place] = block_BI @ basis_IR
    kept = float(np.einsum("or,or->", b_OR, b_OR, dtype=np.float64))  # without a copy of the squares
    basis_IR *= roots_R
    b_OR /= roots_R
    return Factors(np.ascontiguousarray(basis_IR.T), b_OR, total, min(kept, total))
