"""Distances between the tensors of an MoE and those of another tool, beside what rounding explains. No torch.

A distance is the norm of the difference over the norm of ours. Shape suffixes: R rows, C columns, N sampled numbers,
E experts of ours, D hidden.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from frankenmoe.after.matrix import Matrix, as_float, our_chunks, two_axes
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.planning.pairing import FAR

MARGIN = 2.0  # times the rounding to nearest; quantizers that look at text round farther away than that
SURE = 4.0  # standard deviations
STRETCHED = 0.8  # share of a distance
TINY = 1e-30
SAME = 1e-6  # distances below are those of float32 arithmetic
# numbers stored as F32 that were rounded before, by the bits that are zero then
NARROWER = (("BF16", np.uint32(0xFFFF)), ("F16", np.uint32(0x1FFF)))


@dataclass(frozen=True, slots=True)
class Seen:
    """How far a tensor is from ours.

    `worst` is the distance of the farthest rows that were read together, `rounding` that of our own numbers after
    rounding to the same type. `broken`: it holds NaN or infinity. `zero`: only zeros, where ours is not.
    `stretched` is the part of the distance that is a factor for each column, measured where factors may have moved.
    """

    far: float
    worst: float
    rounding: float
    kind: str
    quantized: bool
    numel: int
    broken: bool = False
    zero: bool = False
    fits: bool = True
    stretched: float = 0.0

    @property
    def moved(self) -> float:
        """The part of the distance that rounding does not explain; 0 where it may explain all."""
        if not self.far > MARGIN * self.rounding + SAME:
            return 0.0
        return math.sqrt(max(0.0, self.far**2 - self.rounding**2))

    @property
    def scaled(self) -> bool:
        """Whether factors for its columns explain why it is farther away than rounding."""
        return self.stretched > STRETCHED * self.moved > 0

    @property
    def unlike(self) -> bool:
        """Whether it is unlike ours."""
        return self.broken or self.zero or not self.fits or self.far >= FAR

    @property
    def lost(self) -> bool:
        """Whether it is unlike ours, as a whole or in some rows."""
        return self.unlike or self.worst >= FAR


def compare(write: TensorWrite, matrix: Matrix, *, folds: bool = False) -> Seen:
    """Compares a tensor of ours with theirs, block by block. More rows of theirs than of ours are ignored.

    `folds`: their method may have multiplied columns.
    """
    shape = two_axes(write.shape)
    if matrix.shape[1] != shape[1] or matrix.shape[0] < shape[0]:
        return _seen(matrix, shape, math.inf, math.inf, 0.0, fits=False)
    total = difference = theirs = worst = rounding = 0.0
    for start, stop, ours_RC in our_chunks(write, shape):
        found_RC = matrix.rows(start, stop)
        if not np.isfinite(found_RC).all():
            return _seen(matrix, shape, math.inf, math.inf, 0.0, broken=True)
        if start == 0:
            rounding = _rounding(ours_RC, found_RC, matrix)
        own, apart = _squares(ours_RC), _squares(found_RC - ours_RC)
        total, difference, theirs = total + own, difference + apart, theirs + float(found_RC.any())
        worst = max(worst, apart / own if own else 0.0)
    far = math.sqrt(difference / (total or 1.0))
    seen = _seen(matrix, shape, far, math.sqrt(worst), rounding, zero=bool(total) and not theirs)
    return replace(seen, stretched=_stretched(write, matrix, shape)) if folds and seen.moved and shape[0] > 1 else seen


def _stretched(write: TensorWrite, matrix: Matrix, shape: tuple[int, int]) -> float:
    """How far ours is from itself with every column times the factor that brings it nearest to theirs."""
    both_C, own_C = np.zeros((2, shape[1]))
    for start, stop, ours_RC in our_chunks(write, shape):
        both_C += np.einsum("rc,rc->c", ours_RC, matrix.rows(start, stop))
        own_C += np.einsum("rc,rc->c", ours_RC, ours_RC)
    return math.sqrt(float((np.square(both_C - own_C) / np.maximum(own_C, TINY)).sum() / max(own_C.sum(), TINY)))


def _seen(matrix: Matrix, shape: tuple[int, int], far: float, worst: float, rounding: float, **odd: bool) -> Seen:
    stored = matrix.stored
    return Seen(far, worst, rounding, stored.kind, stored.quantized, math.prod(shape), **odd)


def _rounding(ours_RC: Floats, found_RC: Floats, matrix: Matrix) -> float:
    """The distance that rounding to its type gives the first of our numbers."""
    kept = next((kind for kind, spare in NARROWER if not (found_RC.view(np.uint32) & spare).any()), None)
    rounded = matrix.stored.rounded if matrix.stored.kind != "F32" or kept is None else as_float(kept)
    norm = _squares(ours_RC)
    return math.sqrt(_squares(rounded(ours_RC) - ours_RC) / norm) if norm else 0.0


def _squares(numbers: Floats) -> float:
    return float(np.square(numbers, dtype=np.float64).sum())


def nearest(theirs_N: Floats, ours_EN: Floats, own: int) -> tuple[int, float]:
    """Which of ours theirs is, and its distance. It is `own` unless another is nearer by more than chance.

    If theirs is `own` with an error e, the difference of the two squared distances is 2 <e, d> - |d|^2, where d leads
    from `own` to the other one. Errors of rounding do not know d, so its standard deviation is 2 sqrt(sum of (e d)^2).
    """
    apart_E = np.array([_squares(theirs_N - each_N) for each_N in ours_EN])
    best = int(apart_E.argmin())
    if own < len(ours_EN) and best != own:
        d_N = ours_EN[best] - ours_EN[own]
        noise = 2 * math.sqrt(_squares((theirs_N - ours_EN[best]) * d_N))
        best = own if _squares(d_N) <= SURE * noise else best
    return best, distance(theirs_N, ours_EN[best])


@dataclass(frozen=True)
class RouterSeen:
    """A layer's gate. `rows` says which of our rows each of theirs is; None for a row that resembles none."""

    layer: int
    seen: Seen
    rows: tuple[int | None, ...]
    transposed: bool = False


def compare_gate(layer: int, write: TensorWrite, matrix: Matrix, experts: int) -> RouterSeen:
    """Compares a gate [experts, D] with theirs, row by row."""
    count, hidden = two_axes(write.shape)
    ours_ED = np.concatenate([rows for _, _, rows in our_chunks(write, (count, hidden))])
    found = matrix.rows(0, matrix.shape[0])
    finite = bool(np.isfinite(found).all())
    if matrix.shape == (hidden, experts) != (experts, hidden):
        return RouterSeen(layer, _apart(found.T, ours_ED, matrix, fits=False), (None,) * experts, transposed=True)
    fits = matrix.shape == (experts, hidden)
    if not fits or not finite:
        return RouterSeen(layer, _apart(found, ours_ED, matrix, fits=fits, broken=not finite), (None,) * experts)
    pairs = [nearest(row_D, ours_ED, own) for own, row_D in enumerate(found)]
    rows = tuple(index if far < FAR else None for index, far in pairs)
    seen = _apart(found, ours_ED, matrix)
    turned = found.reshape(hidden, experts).T
    transposed = None in rows and experts > 1 and count == experts and distance(turned, ours_ED) < min(FAR, seen.far)
    return RouterSeen(layer, seen, rows, transposed)


def _apart(found: Floats, ours_ED: Floats, matrix: Matrix, *, fits: bool = True, broken: bool = False) -> Seen:
    far = distance(found, ours_ED) if found.shape == ours_ED.shape and not broken else math.nan
    zero = not found.any() and bool(ours_ED.any())
    stored = matrix.stored
    return Seen(
        far,
        far,
        _rounding(ours_ED, np.ascontiguousarray(found), matrix),
        stored.kind,
        stored.quantized,
        ours_ED.size,
        broken=broken,
        zero=zero,
        fits=fits,
    )


def distance(found: Floats, ours: Floats) -> float:
    """The norm of the difference over the norm of ours; where ours is zero, the norm of the difference."""
    norm = _squares(ours)
    return math.sqrt(_squares(found - ours) / (norm or 1.0))


def root_mean(seen: Sequence[Seen], value: str) -> float:
    """The mean of a distance over tensors, as that of all of them side by side."""
    numel = sum(each.numel for each in seen)
    return math.sqrt(sum(getattr(each, value) ** 2 * each.numel for each in seen) / numel) if numel else 0.0


def finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts with None for NaN and infinity, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in numbers.items()
    }


def percent(share: float) -> str:
    """A distance for people."""
    return f"{100 * share:.3g}%" if share else "0"
