"""Writes what was changed of experts or of the backbone as adapters in PEFT's format."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from frankenmoe.checkpoint.peft import CONFIG, PREFIX, WEIGHTS, adapter_config
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.moe.load import residual_scale
from frankenmoe.planning import Plan
from frankenmoe.planning.asadapter import on_base
from frankenmoe.system import file_names

BACKBONE = "backbone"  # the adapter on the base
Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Dense name of a linear layer -> A and B of its adapter, with scale 1."""


def adapter_names(plan: Plan, paths: Sequence[tuple[int, ...] | None]) -> dict[tuple[int, ...] | None, str]:
    """Path of every expert with an adapter of its own (None: the backbone) -> the name of its folder."""
    titles = {leaf.path: leaf.name for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()}
    names = (BACKBONE if path is None else titles[path] for path in paths)
    return dict(zip(paths, file_names(names, default="expert"), strict=True))


def scales_of(plan: Plan) -> dict[tuple[tuple[int, ...], str], float]:
    """(expert, dense name) -> the factor that the plan applies to that tensor last."""
    leaves = [leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()]
    writes = ((leaf.path, write) for leaf in leaves for row in leaf.ffn.values() for write in row.values())
    return {(path, write.name): residual_scale(write) for path, write in writes}


def source_path(plan: Plan, path: tuple[int, ...] | None) -> str:
    """The path of the model that an expert's adapter is for (None: the adapter on the base), as in the recipe."""
    leaves = [leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()]
    of_base = path is None or on_base(plan.recipe, path)
    source = plan.base if of_base else next(leaf.source for leaf in leaves if leaf.path == path)
    assert source is not None
    return source.name.path


def write_adapter(folder: Path, terms: Terms, *, base: str) -> None:
    """Writes a LoRA in PEFT's format, loadable by peft.PeftModel.from_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config({name: a.shape[0] for name, (a, _) in terms.items()}, base=base)
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": tensor.contiguous()
        for name, pair in terms.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
