"""The tensors of a built artifact as those of its dense base: the way back from `planning/layout.py`."""

import math
from collections.abc import Mapping
from dataclasses import replace

from frankenmoe.checkpoint.tensors import Scale, TensorRef, TensorWrite
from frankenmoe.errors import ArtifactError
from frankenmoe.families.rows import LAYER
from frankenmoe.families.spec import MoEFormat
from frankenmoe.families.words import DOWN
from frankenmoe.planning.translate import Translation, narrowed, rows_of, turned

HALF = Scale(0.5)
Tensors = Mapping[str, TensorRef]


def stored(tensors: Tensors, stored_name: str, name: str) -> TensorWrite:
    """The tensor stored as `stored_name`, as a write with another name. ArtifactError if it is missing."""
    ref = _found(tensors, stored_name)
    return TensorWrite(name, ref.dtype, ref.shape, (ref,))


def stored_backbone(tensors: Tensors, translation: Translation) -> tuple[TensorWrite, ...]:
    """Every backbone tensor under its dense name. ArtifactError if one is missing."""
    family, config = translation.family, translation.config
    return tuple(
        translation.dense(name, shape, lambda plain: stored(tensors, translation.fmt.named(plain), plain))
        for name, shape in family.shapes(family.backbone, config).items()
    )


def stored_ffn(
    tensors: Tensors, translation: Translation, templates: Mapping[str, tuple[str, ...]], *, index: int, halved: bool
) -> dict[int, dict[str, TensorWrite]]:
    """Layer -> dense suffix -> write of the expert `index`; `templates` are those of experts or of the shared one.

    `halved` undoes the doubling of an ungated shared expert, whose constant gate is one half.
    """
    rows = {}
    for layer, row in translation.family.layered(translation.config).items():
        plain = _plain(tensors, translation.fmt, templates, layer=layer, index=index, halved=halved)
        rows[layer] = {key: translation.dense(name, shape, plain.__getitem__) for key, (name, shape) in row.items()}
    return rows


def _plain(
    tensors: Tensors, fmt: MoEFormat, templates: Mapping[str, tuple[str, ...]], *, layer: int, index: int, halved: bool
) -> dict[str, TensorWrite]:
    """Plain name -> write of one expert in one layer: a tensor, or a part of one that several matrices share."""
    found = {}
    for template, suffixes in templates.items():
        ref = _found(tensors, template.format(layer=layer, expert=index))
        first = index * math.prod(ref.shape[-2:]) if len(ref.shape) == 3 else 0
        own = narrowed(ref, ref.shape[-2:], first)
        whole = TensorWrite("", ref.dtype, own.shape, (own,))
        if fmt.turned and len(ref.shape) == 3:
            whole = turned([whole])
        rows = whole.shape[0] // len(suffixes)
        for place, suffix in enumerate(suffixes):
            name = f"{LAYER.format(layer=layer)}mlp.{suffix}"
            write = rows_of(whole, name, place * rows, rows)
            found[name] = replace(write, steps=(*write.steps, HALF)) if halved and (suffix,) == DOWN else write
    return found


def _found(tensors: Tensors, name: str) -> TensorRef:
    if name not in tensors:
        raise ArtifactError(f"the artifact has no tensor {name}", hint="build the artifact again")
    return tensors[name]
