"""The arithmetic of healing: a matrix is refitted by ridge regression so that its layer's output meets a target.

With inputs a and errors e of the layer's output, token by token, the change D minimises
sum_n w_n |e_n - D a_n|^2 + ridge * m * |D|^2, where m is the mean diagonal of the Gram matrix sum_n w_n a_n a_n^T.
Then D = C (G + ridge m 1)^-1 with C = sum_n w_n e_n a_n^T (ridge regression, Hoerl and Kennard 1970).

Shape suffixes: N tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from frankenmoe.moe.device import in_float64
from frankenmoe.moe.processes import all_reduce

PARTS = 4  # of a Gram matrix's rows, computed one after the other
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LITTLE = 1e-6  # of the mean diagonal, for inputs that are always zero
SAME = 1e-12  # mean squared error, relative to the states, of states that are equal up to rounding


class Moments:
    """The sums over tokens that a refit needs. Their size does not depend on the number of tokens.

    Products are computed in float32 and added in float64 (Apple's GPUs have only float32), so that the order in which
    tokens are added, which depends on the number of processes, does not matter.
    """

    def __init__(self, inputs: int, outputs: int, *, device: torch.device | None = None) -> None:
        kind = torch.float32 if device is not None and device.type == "mps" else torch.float64
        self.gram_II = torch.zeros(inputs, inputs, dtype=kind, device=device)
        self.cross_OI = torch.zeros(outputs, inputs, dtype=kind, device=device)
        self.error = 0.0
        self.tokens = 0

    def add(self, inputs_NI: torch.Tensor, errors_NO: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Adds tokens."""
        root_N1 = weights_N.float().sqrt()[:, None]
        scaled_NI, scaled_NO = inputs_NI.float() * root_N1, errors_NO.float() * root_N1
        self._add_gram(scaled_NI)
        self.cross_OI += scaled_NO.T @ scaled_NI
        self.error += float(in_float64(scaled_NO).pow(2).sum())
        self.tokens += len(inputs_NI)

    def all_reduce(self) -> None:
        """Adds up the sums of all processes of a launcher; each of them calls this and gets the result."""
        all_reduce(self.gram_II)
        all_reduce(self.cross_OI)
        counts = all_reduce(torch.tensor([self.error, self.tokens], dtype=torch.float64))
        self.error, self.tokens = float(counts[0]), int(counts[1])

    def _add_gram(self, inputs_NI: torch.Tensor) -> None:
        """Adds to the lower half and its mirror image, by blocks of rows: 5/8 of the work of the whole product."""
        size = inputs_NI.shape[1]
        edges = [size * part // PARTS for part in range(PARTS + 1)]
        for start, end in pairwise(edges):
            rows_PI = inputs_NI[:, start:end].T @ inputs_NI[:, :end]
            self.gram_II[start:end, :end] += rows_PI
            self.gram_II[:start, start:end] += rows_PI[:, :start].T

    def error_after(self, change_OI: torch.Tensor) -> float:
        """sum_n w_n |e_n - D a_n|^2 for a change D of the matrix."""
        change_OI = in_float64(change_OI)
        cross = float((change_OI * in_float64(self.cross_OI)).sum())
        return self.error - 2 * cross + float((change_OI @ in_float64(self.gram_II) * change_OI).sum())


@dataclass(frozen=True)
class Refit:
    """The change of a matrix, the ridge that gave it, and the share of the held-out error that it leaves."""

    change_OI: torch.Tensor
    ridge: float
    left: float


def refit(kept: Moments, held: Moments, *, ridges: Sequence[float] = RIDGES, first: float | None = None) -> Refit:
    """The change with the ridge that leaves the smallest error of held-out tokens; no change if none lowers it.

    The error has one minimum in the ridge, so ridges (ascending) are tried downhill from `first`, by default the middle
    one: usually three of them.
    """
    gram_II = in_float64(kept.gram_II)
    unit = float(gram_II.diagonal().mean())
    nothing = Refit(torch.zeros_like(kept.cross_OI, dtype=torch.float32), float("inf"), 1.0)
    if not unit or held.error <= SAME * held.tokens:
        return nothing

    @cache
    def attempt(index: int) -> Refit:
        damped_II = gram_II.clone()
        damped_II.diagonal().add_(ridges[index] * unit)
        factor_II = torch.linalg.cholesky(damped_II)
        change_OI = torch.cholesky_solve(in_float64(kept.cross_OI).T, factor_II).T.float().to(kept.cross_OI.device)
        return Refit(change_OI, ridges[index], held.error_after(change_OI) / held.error)

    at = ridges.index(first) if first in ridges else len(ridges) // 2
    while True:
        near = [index for index in (at, at - 1, at + 1) if 0 <= index < len(ridges)]
        best = min(near, key=lambda index: attempt(index).left)
        if best == at:
            return min(nothing, attempt(at), key=lambda each: each.left)
        at = best


def low_rank(change_OI: torch.Tensor, gram_II: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [R, I], B [O, R]): the B A of this rank nearest to a change D, in the norm |(D - B A) G^(1/2)| of its inputs.

    The truncated singular value decomposition of D S, with S S^T = G, times the inverse of S.
    """
    damped_II = in_float64(gram_II).clone()
    damped_II.diagonal().add_(LITTLE * damped_II.diagonal().mean())
    root_II = torch.linalg.cholesky(damped_II)
    left_OR, values_R, right_RI = torch.linalg.svd(in_float64(change_OI) @ root_II, full_matrices=False)
    rank = min(rank, len(values_R))
    b_OR = left_OR[:, :rank] * values_R[:rank].sqrt()
    scaled_RI = values_R[:rank].sqrt()[:, None] * right_RI[:rank]
    a_RI = torch.linalg.solve_triangular(root_II, scaled_RI, upper=False, left=False)
    a_RI, b_OR = (each.float().contiguous().to(change_OI.device) for each in (a_RI, b_OR))
    return a_RI, b_OR
