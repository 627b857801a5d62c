"""Confidence intervals by resampling rows, paired where two models read the same rows. Does not import torch.

Shape suffixes: R resamples, N rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
PIECE = 4_000_000  # random numbers in memory at once


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


Group = tuple[Sequence[float], Sequence[float], float]
"""Numerators and denominators by row, and the weight of the group."""


def weighted(groups: Sequence[Group]) -> Interval:
    """The weighted sum over groups of sum / sum, such as nats per token. Each group is resampled separately."""
    generator = np.random.default_rng(SEED)
    value, drawn_R = 0.0, np.zeros(RESAMPLES)
    for numerators, denominators, weight in groups:
        top_N, bottom_N = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
        value += weight * top_N.sum() / bottom_N.sum()
        drawn_R += weight * _resampled(top_N, bottom_N, generator)
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def _resampled(
    top_N: NDArray[np.float64], bottom_N: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    rows = len(top_N)
    step = max(1, PIECE // rows)
    parts = []
    for start in range(0, RESAMPLES, step):
        picked_RN = generator.integers(rows, size=(min(step, RESAMPLES - start), rows))
        parts.append(top_N[picked_RN].sum(axis=1) / bottom_N[picked_RN].sum(axis=1))
    return np.concatenate(parts)


def minus(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Differences by row, so that a row's difficulty for both models cancels."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]
