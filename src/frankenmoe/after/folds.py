"""Factors that AWQ and SmoothQuant move: columns are multiplied, and what gives their inputs is divided. No torch.

Such a model computes the same as before, with other numbers. Here the factors are taken back, so that theirs can be
compared with ours. Those of a norm are ours over theirs, since norms are not quantized. Those of the rows of `v_proj`
and `up_proj`, which give the inputs of `o_proj` and `down_proj`, follow by least squares.

Sources: get_layers_for_scaling in AutoAWQ 0.2.9 (awq/models/mixtral.py, qwen3_moe.py), AWQ_MAPPING_REGISTRY in
llm-compressor 0.14: input norm -> q, k, v; v -> o where they are of one size; norm before the FFN -> gate and up of
every expert, and the router's gate; up -> down. Shape suffixes: R rows, C columns, M and N vectors, S their numbers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeVar

import numpy as np

from frankenmoe.after.compare import distance
from frankenmoe.after.matrix import Matrix, first_rows, our_chunks, two_axes
from frankenmoe.after.other import EXPERTS, ROUTERS, SHARED, Other, Place
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.families.words import DOWN, GATE_UP

FOLDED = 0.02  # factors nearer to 1 are left alone; fine-tuning moves norms by a tenth of that
DIVIDED = 0.1  # a norm that is farther away was divided, also if no matrix was multiplied; AWQ moves norms by thirds
NEAR = 0.1  # the error of factors that follow by least squares from rounded numbers is far smaller
ALIKE = 0.5  # cosine of two rows that differ by a factor and by rounding
SAMPLE = 2**12  # numbers of a matrix that tell whether it was multiplied
ATTENTION_NORMS = ("input_layernorm", "operator_norm")
# the FFN reads the first of these that is there; formats without a norm before attention have none before the FFN
FFN_NORMS = ("pre_feedforward_layernorm", "ffn_norm", "post_attention_layernorm", *ATTENTION_NORMS)
READS_NORM = re.compile(r"\.(q_proj|k_proj|v_proj|in_proj\w*)\.weight$")
VALUE_OUTPUT_BIAS = [
    f"model.layers.{{layer}}.self_attn.{name}" for name in ("v_proj.weight", "o_proj.weight", "v_proj.bias")
]
GATE, UP = GATE_UP
T = TypeVar("T")


@dataclass
class Evened:
    """`theirs` without moved factors; those of experts' `up_proj` are still there, since experts must be paired first.

    `layers` had some. `one_sided` has (part, layer) of matrices that were not multiplied although the norm before them
    was divided.
    """

    theirs: dict[Place, Matrix]
    layers: list[int] = field(default_factory=list)
    one_sided: list[tuple[str, int]] = field(default_factory=list)


def evened(other: Other) -> Evened:
    """Takes back the factors of a model whose method moves some."""
    found = Evened(dict(other.theirs))
    layers = sorted({place.layer for place in other.ours if place.part == EXPERTS}) if other.folds else []
    for layer in layers:
        for norm, readers in _readers(other, layer):
            _even_norm(found, other, norm, readers)
        here = {place.name: place for place in other.ours if place.layer == layer and place in found.theirs}
        value, output, bias = (here.get(name.format(layer=layer)) for name in VALUE_OUTPUT_BIAS)
        if value and output:
            factors_R = even_rows(found.theirs, other.ours[value], value, output)
            if bias and _follows(other, bias, factors_R):
                found.theirs[bias] = _as_ours(other, bias)
        up, down = (Place(SHARED, layer, 0, suffix) for suffix in (UP, *DOWN))
        if up in found.theirs and down in found.theirs:
            even_rows(found.theirs, other.ours[up], up, down)
    return found


def even_rows(theirs: dict[T, Matrix], ours: TensorWrite, rows: T, columns: T) -> Floats:
    """Takes back what the rows of a matrix were multiplied by, and the columns of the one behind it divided by.

    Returns these factors [R].
    """
    factors_R = np.ones(theirs[rows].shape[0], np.float32)
    if theirs[rows].shape == two_axes(ours.shape) and theirs[columns].shape[1] == len(factors_R):
        found_R = _row_factors(ours, theirs[rows])
        if distance(found_R, factors_R) >= FOLDED:
            factors_R = found_R
            theirs[rows] = theirs[rows].times(rows_R=np.reciprocal(factors_R))
            theirs[columns] = theirs[columns].times(columns_C=factors_R)
    return factors_R


def _follows(other: Other, vector: Place, factors_C: Floats) -> bool:
    """Whether a vector of ours times these factors is theirs, as far as the factors are known."""
    theirs_C, ours_C = other.theirs[vector].rows(0, 1)[0], first_rows(other.ours[vector], 1)[0]
    return theirs_C.shape == ours_C.shape and distance(theirs_C / factors_C, ours_C) < NEAR


def _as_ours(other: Other, place: Place) -> Matrix:
    """A vector of theirs whose factors follow from ours."""
    return replace(other.theirs[place], rows=lambda start, stop: first_rows(other.ours[place], 1))


def _row_factors(ours: TensorWrite, theirs: Matrix) -> Floats:
    """What each row of ours was multiplied by, by least squares; 1 for rows that do not resemble ours."""
    found = np.ones(theirs.shape[0], np.float32)
    for start, stop, ours_RC in our_chunks(ours, theirs.shape):
        theirs_RC = theirs.rows(start, stop)
        both, own, other = (
            np.einsum("rc,rc->r", *pair, dtype=np.float64)
            for pair in ((ours_RC, theirs_RC), (ours_RC, ours_RC), (theirs_RC, theirs_RC))
        )
        alike = both > ALIKE * np.sqrt(own * other)
        found[start:stop][alike] = both[alike] / own[alike]
    return found


def _readers(other: Other, layer: int) -> Iterator[tuple[Place, list[Place]]]:
    """The norms of a layer and the matrices that read each."""
    here = [place for place in other.theirs if place.layer == layer]
    norms = {place.name.split(".")[-2]: place for place in here if place.name.endswith("norm.weight")}
    before = next((norms[name] for name in ATTENTION_NORMS if name in norms), None)
    if before is not None:
        behind = next(norms[name] for name in FFN_NORMS if name in norms)
        attention = [place for place in here if READS_NORM.search(place.name)]
        ffn = [
            place
            for place in here
            if place.part == ROUTERS or (place.part in (EXPERTS, SHARED) and place.name in GATE_UP)
        ]
        yield from ((before, attention), (behind, ffn)) if before != behind else ((before, [*attention, *ffn]),)


def _even_norm(found: Evened, other: Other, norm: Place, readers: Sequence[Place]) -> None:
    """Takes back what a norm was divided by, where the matrices of a part were multiplied by it."""
    ours_C, theirs_C = (
        rows[0] + other.norms_add for rows in (first_rows(other.ours[norm], 1), other.theirs[norm].rows(0, 1))
    )
    if ours_C.shape != theirs_C.shape or not (ours_C * theirs_C > 0).all() or not np.isfinite(theirs_C).all():
        return
    far = distance(theirs_C, ours_C)
    if far < FOLDED:
        return
    factors_C = np.asarray(ours_C / theirs_C, np.float32)
    taken, missed = [], []
    for part in dict.fromkeys(place.part for place in readers):
        places = [place for place in readers if place.part == part and other.theirs[place].shape[1] == len(factors_C)]
        if _multiplied(other, places, factors_C):
            taken += places
        else:
            missed.append((part, norm.layer))
    if taken or far > DIVIDED:
        found.one_sided += missed
    if taken:
        found.layers.append(norm.layer)
        found.theirs |= {place: found.theirs[place].times(columns_C=np.reciprocal(factors_C)) for place in taken}
        found.theirs[norm] = _as_ours(other, norm)


def _multiplied(other: Other, places: Sequence[Place], factors_C: Floats) -> bool:
    """Whether most of these matrices are nearer to ours once the factors are taken back."""
    as_stored, taken_back = [], []
    for theirs_MRC, ours_NRC in _samples(other, places):
        as_stored += _nearest(theirs_MRC, ours_NRC)
        taken_back += _nearest(theirs_MRC / factors_C, ours_NRC)
    return not median(as_stored or [0.0]) < median(taken_back or [0.0])


def _samples(other: Other, places: Sequence[Place]) -> Iterator[tuple[Floats, Floats]]:
    """First rows of theirs and of those of ours that each may be, which for experts and router rows is any of them."""
    for part, layer, _, name in dict.fromkeys(place._replace(expert=0) for place in places):
        if part == EXPERTS and name != GATE:
            continue
        same = (part, layer, name)
        ours = [write for each, write in other.ours.items() if (each.part, each.layer, each.name) == same]
        if not ours:
            continue
        rows, columns = two_axes(ours[0].shape)
        theirs = [other.theirs[place] for place in places if place.name == name]
        if (part, name) == (ROUTERS, "gate"):
            yield theirs[0].rows(0, theirs[0].shape[0])[:, None], first_rows(ours[0], rows)[:, None]
            continue
        count = min(rows, max(1, SAMPLE // columns))
        fitting = [matrix.rows(0, count) for matrix in theirs if matrix.shape == (rows, columns)]
        if fitting:
            yield np.stack(fitting), np.stack([first_rows(write, count) for write in ours])


def _nearest(theirs_MRC: Floats, ours_NRC: Floats) -> list[float]:
    """The distance of each of theirs from the nearest of ours, as far as it is a number."""
    if theirs_MRC.shape[1:] != ours_NRC.shape[1:]:
        return []
    theirs_MS, ours_NS = (each.reshape(len(each), -1).astype(np.float64) for each in (theirs_MRC, ours_NRC))
    theirs_MS = theirs_MS[np.isfinite(theirs_MS).all(axis=1)]
    squares_MN = np.square(theirs_MS).sum(1)[:, None] + np.square(ours_NS).sum(1) - 2 * theirs_MS @ ours_NS.T
    norms_M = np.sqrt(np.square(ours_NS).sum(1))[squares_MN.argmin(1)]
    return [float(each) for each in np.sqrt(np.maximum(squares_MN.min(1), 0)) / np.maximum(norms_M, 1e-30)]
