"""Writes the numbers of another tool's model as an ordinary checkpoint, so that it runs here. No torch.

Shape suffixes: R rows, C columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frankenmoe.after.matrix import CHUNK
from frankenmoe.after.other import EXPERTS, ROUTERS, SHARED, TOP_K, Other, Place
from frankenmoe.artifact.folder import write_json
from frankenmoe.checkpoint.cast import Bytes, encode
from frankenmoe.checkpoint.header import header_bytes
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.checkpoint.values import blocks
from frankenmoe.checkpoint.weights import SINGLE
from frankenmoe.checkpoint.writer import replacing, write_all
from frankenmoe.errors import PlanError
from frankenmoe.planning.heads import HEAD
from frankenmoe.planning.layout import built_writes
from frankenmoe.planning.parts import Parts
from frankenmoe.progress import Progress
from frankenmoe.recipe.backbone import ATTENTION
from frankenmoe.subject import Subject


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the checkpoint and the places whose numbers it stacks."""

    write: TensorWrite
    places: tuple[Place, ...]


def write_plain(folder: Path, other: Other, subject: Subject, progress: Progress) -> None:
    """Writes the other model into `folder`, in the format and the type of the artifact.

    Tensors that the format adds are the artifact's. Raises PlanError for a file whose numbers cannot be turned back.
    """
    if other.plain is None:
        raise PlanError(f"{other.where} stores some tensors in another form", hint="compare its weights alone")
    parts, fmt = subject.parts, subject.parts.stock[0]
    tensors = list(_tensors(parts, other))
    head = header_bytes([(each.write.name, each.write.dtype, each.write.shape) for each in tensors], metadata={})
    size = len(head) + sum(each.write.nbytes for each in tensors)
    progress.start("dequantizing", size, "B")
    with replacing(folder / SINGLE, size=size) as target:
        write_all(target, head)
        for tensor in tensors:
            for block in _bytes(tensor, other) if tensor.places else blocks(tensor.write):
                write_all(target, block.data)
                progress.advance(block.size)
    config = built_config(subject)
    key = next(key for key, quantity in fmt.counted.items() if quantity == "experts_per_token")
    found = {name: theirs for name, _, theirs in other.settings}
    changes = {key: found.get(TOP_K, parts.top_k)}
    if any(each.write.name == HEAD for each in tensors):
        changes["tie_word_embeddings"] = False
    write_json(folder / "config.json", config | changes)


def built_config(subject: Subject) -> dict[str, Any]:
    """The config.json of an artifact's built form."""
    artifact = subject.artifact
    if artifact is not None and subject.built:
        return read_object(artifact.folder / "config.json", hint="build the artifact again")
    return dict(subject.plan.config or {})


def _tensors(parts: Parts, other: Other) -> Iterator[_Tensor]:
    """Every tensor of the built form, gates included, and a head that ours ties to its embeddings."""
    fmt, there = parts.stock[0], parts.translation
    known = {place.name: place for place in other.theirs if place.part not in (EXPERTS, SHARED, ROUTERS)}
    stacks: dict[str, tuple[Place, ...]] = {name: (place,) for name, place in known.items()}
    count = len(parts.nodes)
    for layer in parts.expert_layers:
        for template, suffixes in fmt.expert.items():
            for some in [[index] for index in range(count)] if "{expert}" in template else [list(range(count))]:
                places = tuple(Place(EXPERTS, layer, index, suffix) for index in some for suffix in suffixes)
                stacks[template.format(layer=layer, expert=some[0])] = places
        for template, suffixes in fmt.shared.items() if parts.shared else ():
            stacks[template.format(layer=layer)] = tuple(Place(SHARED, layer, 0, suffix) for suffix in suffixes)
        stacks[fmt.gate.format(layer=layer)] = (Place(ROUTERS, layer, 0, "gate"),)
        if parts.shared_kind == "gated" and fmt.shared_gate:
            stacks[fmt.shared_gate.format(layer=layer)] = (Place(ROUTERS, layer, 0, "shared gate"),)
    dtype = parts.backbone[0].dtype
    groups = built_writes(
        there, parts.backbone, parts.nodes, parts.shared, gated_shared=parts.shared_kind == "gated", dtype=dtype
    )
    writes = [*(write for group in groups for write in group), *parts.gates.values()]
    if HEAD in known and all(write.name != HEAD for write in writes):
        writes.append(other.ours[known[HEAD]])
    for write in writes:
        yield _Tensor(write, stacks.get(write.name, ()))


def _bytes(tensor: _Tensor, other: Other) -> Iterator[Bytes]:
    """The numbers at its places, one after the other."""
    assert other.plain is not None
    for place in tensor.places:
        matrix = other.theirs[place]
        # rows of attention may lie in another order, so they are turned back together
        step = matrix.shape[0] if place.part == ATTENTION else max(1, CHUNK // matrix.shape[1])
        for start in range(0, matrix.shape[0], step):
            rows_RC = other.plain(place, matrix.rows(start, min(start + step, matrix.shape[0])))
            yield encode(np.ascontiguousarray(rows_RC, np.float32).ravel(), dtype=tensor.write.dtype)
