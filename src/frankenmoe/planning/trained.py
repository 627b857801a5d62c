"""Routers and tensors from training, put into a plan in place of those of the sources.

In the file, a backbone tensor has its dense name. An expert's tensor is prefixed by the expert's path, such as
`experts.2.model.layers.0.mlp.up_proj.weight`; `experts.2.0.` is a nested expert, `shared.0.` a shared one.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.hub import local_path
from frankenmoe.checkpoint.tensors import FLOATS, LowRank, Scale, TensorRef, TensorWrite
from frankenmoe.errors import SourceError
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.recipe import Recipe

TRAINED = "model-trained.safetensors"


def open_trained(recipe: Recipe) -> Mapping[str, TensorRef]:
    """The tensors of the recipe's `trained` file, by name. Raises SourceError if it cannot be read."""
    return {} if recipe.trained is None else read_header(local_path(recipe.trained, folder=recipe.folder))


def read_routers(file: Path, wanted: Mapping[str, tuple[int, int]]) -> Mapping[str, TensorRef]:
    """The gates in a file. Raises SourceError unless they are exactly `wanted` (name -> shape), all floats."""
    refs = read_header(file)
    for name in {**wanted, **refs}:
        ref, shape = refs.get(name), wanted.get(name)
        if ref is None:
            odd = f"lacks {name}, a router of this MoE"
        elif shape is None:
            odd = f"holds {name}, which is not a router of this MoE"
        elif ref.shape != shape or ref.dtype not in FLOATS:
            odd = f"holds {name} as {ref.dtype} {list(ref.shape)}, expected floats {list(shape)}"
        else:
            continue
        raise SourceError(
            f"{file} {odd}",
            hint="these routers belong to another MoE; remove `routers` to compute them by gate_mode",
        )
    return refs


def trained_name(path: tuple[int, ...], dense: str) -> str:
    """The name of an expert's tensor in the file."""
    head = ("shared", *path[1:]) if path[:1] == SHARED else ("experts", *path)
    return ".".join((*map(str, head), dense))


def with_trained(writes: tuple[TensorWrite, ...], trained: Mapping[str, TensorRef]) -> tuple[TensorWrite, ...]:
    """The backbone's writes, with trained tensors as inputs where they exist."""
    return tuple(_replaced(write, trained.get(write.name)) for write in writes)


def nodes_with_trained(nodes: tuple[ExpertNode, ...], trained: Mapping[str, TensorRef]) -> tuple[ExpertNode, ...]:
    """The same for experts, at any depth."""
    return tuple(
        replace(
            node,
            children=nodes_with_trained(node.children, trained),
            ffn={
                layer: {
                    suffix: _replaced(write, trained.get(trained_name(node.path, write.name)))
                    for suffix, write in row.items()
                }
                for layer, row in node.ffn.items()
            },
        )
        for node in nodes
    )


def check_used(
    recipe: Recipe,
    trained: Mapping[str, TensorRef],
    *,
    backbone: tuple[TensorWrite, ...],
    nodes: tuple[ExpertNode, ...],
) -> None:
    """Raises SourceError for a trained tensor that belongs to no part of this recipe."""
    experts = (write for node in nodes for leaf in node.leaves() for row in leaf.ffn.values() for write in row.values())
    used = {ref for write in (*backbone, *experts) for ref in write.sources}
    for name, ref in trained.items():
        if ref not in used:
            raise SourceError(
                f"{ref.file} holds {name}, which is not a tensor of {recipe.origin}",
                hint="this file belongs to another MoE; use the one beside its own recipe",
            )


def _replaced(write: TensorWrite, ref: TensorRef | None) -> TensorWrite:
    """The write with `ref` as its input. Noise is dropped: training already saw it. Adapters and scales stay."""
    if ref is None:
        return write
    if ref.shape != write.shape or ref.dtype not in FLOATS:
        raise SourceError(
            f"{ref.file} holds {ref.name} as {ref.dtype} {list(ref.shape)}, expected floats {list(write.shape)}",
            hint="this file belongs to another MoE; use the one beside its own recipe",
        )
    return replace(write, inputs=(ref,), steps=tuple(step for step in write.steps if isinstance(step, LowRank | Scale)))
