"""Which expert of an MoE each expert of another tool's model is, by content, and how far it is from it. No torch.

Pairs are found on the first rows of every matrix, distances are those of whole matrices.
Shape suffixes: E experts of ours, N sampled numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import numpy as np

from frankenmoe.after.compare import Seen, compare, distance, nearest
from frankenmoe.after.matrix import Matrix, our_chunks, two_axes
from frankenmoe.after.other import EXPERTS, Other, Place
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.families.words import FFN_SUFFIXES
from frankenmoe.planning.pairing import FAR
from frankenmoe.progress import Progress

MOST, LEAST = 2**16, 2**12  # numbers of a matrix that are compared with every expert's
WORK = 2**28  # numbers that are compared in a layer to find its pairs
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
    sample_EN = np.stack([_sample_of_ours(row, size) for row in ours])
    for index in range(other.experts):
        row = _row(other.theirs, layer, index)
        seen = _expert(layer, index, row, ours, sample_EN, size)
        yield seen
        progress.advance(sum(write.nbytes for write in ours[min(index, count - 1)].values()))


def _row(tensors: Mapping[Place, T], layer: int, index: int) -> dict[str, T]:
    places = {suffix: Place(EXPERTS, layer, index, suffix) for suffix in FFN_SUFFIXES}
    return {suffix: tensors[place] for suffix, place in places.items() if place in tensors}


def _expert(
    layer: int, index: int, row: Mapping[str, Matrix], ours: list[dict[str, TensorWrite]], sample_EN: Floats, size: int
) -> ExpertSeen:
    if len(row) < len(ours[0]):
        return ExpertSeen(layer, index, State.MISSING)
    wanted = {suffix: two_axes(write.shape) for suffix, write in ours[0].items()}
    if any(row[suffix].shape != shape for suffix, shape in wanted.items()):
        return ExpertSeen(layer, index, State.MISSHAPEN)
    parts = [_first_rows(matrix, size) for matrix in row.values()]
    sample_N = np.concatenate(parts)
    if not np.isfinite(sample_N).all():
        return ExpertSeen(layer, index, State.BROKEN)
    expert, near = nearest(sample_N, sample_EN, index)
    cuts = np.cumsum([part_N.size for part_N in parts])[:-1]
    own = np.split(sample_EN[expert], cuts)
    if min(map(distance, parts, own)) >= FAR:
        return ExpertSeen(layer, index, State.UNKNOWN if sample_N.any() else State.ZERO, near=near)
    matrices = {suffix: compare(ours[expert][suffix], matrix) for suffix, matrix in row.items()}
    broken = any(seen.broken for seen in matrices.values())
    lost = any(seen.lost for seen in matrices.values())
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


def _rows_of(shape: tuple[int, int], size: int) -> int:
    return min(shape[0], max(1, size // shape[1]))


def _first_rows(matrix: Matrix, size: int) -> Floats:
    return matrix.rows(0, _rows_of(matrix.shape, size)).ravel()


def _sample_of_ours(row: Mapping[str, TensorWrite], size: int) -> Floats:
    parts = []
    for write in row.values():
        shape = two_axes(write.shape)
        wanted = _rows_of(shape, size) * shape[1]
        found = np.empty(0, np.float32)
        for _, _, rows_RC in our_chunks(write, shape):
            found = np.concatenate([found, rows_RC.ravel()])
            if found.size >= wanted:
                break
        parts.append(found[:wanted])
    return np.concatenate(parts)
