"""What healing adds to the virtual form of an MoE. Does not import torch."""

from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.plan import Plan
from frankenmoe.planning.tree import ExpertNode, down_names
from frankenmoe.recipe.sections import HealSettings


def down_suffix(leaf: ExpertNode, layer: int) -> str | None:
    """The name, within the FFN, of the matrix that writes to the residual stream; None if it is not known."""
    return next(
        (each for each in leaf.ffn[layer] if each.startswith(down_names(leaf.source)) and each.endswith(".weight")),
        None,
    )


def heal_bytes(made: Plan, settings: HealSettings) -> int:
    """The most bytes that healing adds: a down projection, or its adapter in float32, of every layer and expert.

    Only experts with data can be healed. An expert whose loss does not fall adds nothing.
    """
    entries = {path: expert for _, path, expert in named_experts(made.recipe.experts)}
    leaves = [leaf for _, path, leaf in named_experts(made.nodes) if not leaf.children and entries[path].data]
    found = 0
    for leaf in leaves:
        for layer, row in leaf.ffn.items():
            suffix = down_suffix(leaf, layer)
            if suffix is not None:
                write = row[suffix]
                least = min(settings.rank or min(write.shape), *write.shape)
                found += least * sum(write.shape) * DTYPES["F32"].itemsize if settings.rank else write.nbytes
    return found
