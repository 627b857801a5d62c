"""What training made: routers, and tensors in the place of the sources' in a plan's writes; not how they came to be.

In their file a tensor of the backbone stands under its dense name, one of an expert behind the expert's path, such as
`experts.2.model.layers.0.mlp.up_proj.weight`; `experts.2.0.` is nested, `shared.0.` shared.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import FLOATS, Lora, Scale, TensorRef, TensorWrite
from frankenmoe.errors import SourceError
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.recipe import Recipe

TRAINED = "model-trained.safetensors"


def open_trained(recipe: Recipe) -> Mapping[str, TensorRef]:
    """The tensors of the file that a recipe calls `trained`, by name; SourceError where it cannot be read."""
    return {} if recipe.trained is None else read_header((recipe.folder / recipe.trained).absolute())


def read_routers(file: Path, wanted: Mapping[str, tuple[int, int]]) -> Mapping[str, TensorRef]:
    """The gates in a file, if they are just those `wanted` (name -> shape) and floats; else SourceError."""
    refs = read_header(file)
    for name in {**wanted, **refs}:
        ref, shape = refs.get(name), wanted.get(name)
        if ref is None:
            odd = f"lacks {name}, a router of this MoE"
        elif shape is None:
            odd = f"holds {name}, which is no router of this MoE"
        elif ref.shape != shape or ref.dtype not in FLOATS:
            odd = f"holds {name} as {ref.dtype} {list(ref.shape)}, expected floats {list(shape)}"
        else:
            continue
        raise SourceError(
            f"{file} {odd}",
            hint="these routers belong to another MoE; remove `routers` to make them by gate_mode",
        )
    return refs


def trained_name(path: tuple[int, ...], dense: str) -> str:
    """What the file calls an expert's tensor."""
    head = ("shared", *path[1:]) if path[:1] == SHARED else ("experts", *path)
    return ".".join((*map(str, head), dense))


def with_trained(writes: tuple[TensorWrite, ...], trained: Mapping[str, TensorRef]) -> tuple[TensorWrite, ...]:
    """The backbone's writes, each reading the trained tensor of its name where there is one."""
    return tuple(_replaced(write, trained.get(write.name)) for write in writes)


def nodes_with_trained(nodes: tuple[ExpertNode, ...], trained: Mapping[str, TensorRef]) -> tuple[ExpertNode, ...]:
    """The same for experts, at any depth."""
    return tuple(
        replace(
            node,
            children=nodes_with_trained(node.children, trained),
            ffn=tuple(
                {
                    suffix: _replaced(write, trained.get(trained_name(node.path, write.name)))
                    for suffix, write in row.items()
                }
                for row in node.ffn
            ),
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
    """SourceError for a trained tensor that belongs to nothing in this recipe."""
    experts = (write for node in nodes for leaf in node.leaves() for row in leaf.ffn for write in row.values())
    used = {ref for write in (*backbone, *experts) for ref in write.inputs}
    for name, ref in trained.items():
        if ref not in used:
            raise SourceError(
                f"{ref.file} holds {name}, which no part of {recipe.origin} is called",
                hint="this file was trained in another MoE; take the one that lies beside its recipe",
            )


def _replaced(write: TensorWrite, ref: TensorRef | None) -> TensorWrite:
    """Noise was there before training, which saw it; adapters and scales are kept beside the weights in both forms."""
    if ref is None:
        return write
    if ref.shape != write.shape or ref.dtype not in FLOATS:
        raise SourceError(
            f"{ref.file} holds {ref.name} as {ref.dtype} {list(ref.shape)}, expected floats {list(write.shape)}",
            hint="this file was trained in another MoE; take the one that lies beside its recipe",
        )
    return replace(write, inputs=(ref,), steps=tuple(step for step in write.steps if isinstance(step, Lora | Scale)))
