"""Which expert of an MoE each expert of another tool's model is, by content, and how far it is from it. No torch.

Pairs are found on the first rows of every matrix, distances are those of whole matrices.
Shape suffixes: E experts of ours, N sampled numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import numpy as np

from frankenmoe.after.compare import Seen, compare, distance, nearest
from frankenmoe.after.folds import even_rows
from frankenmoe.after.matrix import Matrix, first_rows, two_axes
from frankenmoe.after.other import EXPERTS, Other, Place
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.families.words import DOWN, FFN_SUFFIXES, GATE_UP
from frankenmoe.planning.pairing import FAR
from frankenmoe.progress import Progress

MOST, LEAST = 2**16, 2**12  # numbers of a matrix that are compared with every expert's
ROWS = 8  # at least; the columns of down_proj have no direction in one
TINY = 1e-30
WORK = 2**28  # numbers that are compared in a layer to find its pairs
UP = GATE_UP[1]
T = TypeVar("T")


class State(StrEnum):
    """What has become of an expert."""

    FOUND = "found"
    MISSING = "missing"
    MISSHAPEN = "misshapen"
    BROKEN = "not finite"
    ZERO = "zeros"
    UNKNOWN = "unlike every expert"
    TURNED = "gate and up swapped"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class ExpertSeen:
    """Expert `index` of a layer of theirs. `expert` is ours that it is, if it resembles one.

    `near` is the distance on the sample, `matrices` has whole distances by plain name.
    """

    layer: int
    index: int
    state: State
    expert: int | None = None
    near: float = float("nan")
    matrices: Mapping[str, Seen] = field(default_factory=dict)


def compare_experts(other: Other, layer: int, count: int, progress: Progress) -> Iterator[ExpertSeen]:
    """Every expert of a layer of theirs, beside `count` of ours."""
    ours = [_row(other.ours, layer, index) for index in range(count)]
    size = max(LEAST, min(MOST, WORK // (count * max(1, other.experts) * len(ours[0]))))
    counts = {suffix: max(ROWS, size // write.shape[-1]) for suffix, write in ours[0].items()}
    samples = [[first_rows(row[suffix], count) for suffix, count in counts.items()] for row in ours]
    sample_EN = np.stack([np.concatenate(_flat(parts, other)) for parts in samples])
    for index in range(other.experts):
        row = _row(other.theirs, layer, index)
        seen = _expert(layer, index, row, ours, sample_EN, counts, other)
        yield seen
        progress.advance(sum(write.nbytes for write in ours[min(index, count - 1)].values()))


def _row(tensors: Mapping[Place, T], layer: int, index: int) -> dict[str, T]:
    places = {suffix: Place(EXPERTS, layer, index, suffix) for suffix in FFN_SUFFIXES}
    return {suffix: tensors[place] for suffix, place in places.items() if place in tensors}


def _expert(
    layer: int,
    index: int,
    row: dict[str, Matrix],
    ours: list[dict[str, TensorWrite]],
    sample_EN: Floats,
    counts: Mapping[str, int],
    other: Other,
) -> ExpertSeen:
    if len(row) < len(ours[0]):
        return ExpertSeen(layer, index, State.MISSING)
    wanted = {suffix: two_axes(write.shape) for suffix, write in ours[0].items()}
    if any(row[suffix].shape != shape for suffix, shape in wanted.items()):
        return ExpertSeen(layer, index, State.MISSHAPEN)
    parts = _flat([row[suffix].rows(0, min(count, wanted[suffix][0])) for suffix, count in counts.items()], other)
    sample_N = np.concatenate(parts)
    if not np.isfinite(sample_N).all():
        return ExpertSeen(layer, index, State.BROKEN)
    expert, near = nearest(sample_N, sample_EN, index)
    cuts = np.cumsum([part_N.size for part_N in parts])[:-1]
    own = np.split(sample_EN[expert], cuts)
    if min(map(distance, parts, own)) >= FAR:
        return ExpertSeen(layer, index, State.UNKNOWN if sample_N.any() else State.ZERO, near=near)
    if other.folds:
        even_rows(row, ours[expert][UP], UP, *DOWN)
    matrices = {suffix: compare(ours[expert][suffix], matrix, folds=other.folds) for suffix, matrix in row.items()}
    broken = any(seen.broken for seen in matrices.values())
    lost = any(seen.lost and not seen.scaled for seen in matrices.values())
    state = State.BROKEN if broken else State.DAMAGED if lost else State.FOUND
    if lost and _turned(parts, own):
        state = State.TURNED
    return ExpertSeen(layer, index, state, expert, near, matrices)


def _turned(parts: list[Floats], own: list[Floats]) -> bool:
    """Whether gate and up stand in each other's place."""
    if len(parts) < len(FFN_SUFFIXES):  # no gate
        return False
    gate, up, _ = parts
    return gate.size == up.size and max(distance(gate, own[1]), distance(up, own[0])) < FAR


def _flat(parts: Sequence[Floats], other: Other) -> list[Floats]:
    """First rows of gate, up and down, each in a row of numbers.

    Where factors move from rows of up to columns of down, rows of the first ones and columns of down get the norm 1.
    """
    if other.folds:
        axes = [1] * (len(parts) - 1) + [0]
        norms = [np.linalg.norm(part, axis=axis, keepdims=True) for part, axis in zip(parts, axes, strict=True)]
        parts = [part_RC / np.maximum(norm, TINY) for part_RC, norm in zip(parts, norms, strict=True)]
    return [part_RC.ravel() for part_RC in parts]
