"""A model that another tool made, beside the MoE that it was made from: the same tensors of both. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from frankenmoe.after.matrix import Matrix
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.planning.groups import FFN, group_of
from frankenmoe.planning.heads import EMBEDDINGS, HEAD

EXPERTS, ROUTERS, SHARED, OTHERS = "experts", "routers", "shared expert", "other"
TOP_K = "experts per token"


class Place(NamedTuple):
    """Where a tensor belongs: a part of the model, a layer (-1: none), an expert and a plain name."""

    part: str
    layer: int
    expert: int
    name: str


@dataclass(frozen=True)
class Other:
    """What another tool made. `ours` are the MoE's tensors in the order and scale that its file format has.

    `what` names the format, `method` how it says that it is quantized (None: not). `folds`: the method may have
    multiplied columns and divided what gives their inputs; then `norms_add` is what the format adds to a norm's
    weights. `kept` tells which tensors it may leave as they were. `settings` are (name, expected, found) of config
    values that change what it computes. `plain` turns its numbers at a place into those of a checkpoint; None where it
    cannot.
    """

    where: str
    what: str
    experts: int
    layers: int
    ours: Mapping[Place, TensorWrite]
    theirs: Mapping[Place, Matrix]
    method: str | None = None
    folds: bool = False
    norms_add: float = 0.0
    kept: Callable[[str], bool] = lambda name: False
    settings: tuple[tuple[str, Any, Any], ...] = ()
    notes: tuple[str, ...] = ()
    plain: Callable[[Place, Floats], Floats] | None = lambda place, rows_RC: rows_RC


def backbone_place(name: str, layer: int) -> Place:
    """The place of a plain tensor outside the experts."""
    group = group_of(name)
    return Place(OTHERS if group == FFN else group, layer, 0, name)


def own_head(ours: Mapping[Place, TensorWrite]) -> dict[Place, TensorWrite]:
    """What a head holds that is stored beside embeddings that ours ties to it; empty where ours is stored too.

    Transformers and llama.cpp use a stored head whatever the config says.
    """
    head, embeddings = backbone_place(HEAD, -1), ours.get(backbone_place(EMBEDDINGS, -1))
    return {} if head in ours or embeddings is None else {head: replace(embeddings, name=HEAD)}


def differing(pairs: Mapping[str, tuple[Any, Any]]) -> tuple[tuple[str, Any, Any], ...]:
    """(name, expected, found) of the settings that differ; numbers may differ by a rounding to float32."""
    return tuple((name, ours, theirs) for name, (ours, theirs) in pairs.items() if not _equal(ours, theirs))


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= 1e-6 * max(abs(ours), abs(theirs))
    return bool(ours == theirs)
