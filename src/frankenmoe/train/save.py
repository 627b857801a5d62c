"""Writes trained weights as files of an artifact: gates, PEFT adapters, whole tensors, and the recipe naming them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from frankenmoe.artifact.folder import ROUTERS, Routers
from frankenmoe.checkpoint.cast import encode
from frankenmoe.checkpoint.links import ADAPTERS
from frankenmoe.checkpoint.tensors import LowRank
from frankenmoe.checkpoint.values import values
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.moe.written import Terms, adapter_names, scales_of, source_path, write_adapter
from frankenmoe.planning import Plan
from frankenmoe.planning.trained import TRAINED, trained_name
from frankenmoe.recipe.moved import moved_recipe

Weights = Mapping[str, torch.Tensor]


def new_routers(routers: Routers, weights: Weights) -> Routers:
    """All gates, the trained ones with their new values, in their stored types."""
    found = dict(routers)
    for key, tensor in weights.items():
        kind, _, name = key.partition("/")
        if kind == "router":
            dtype, shape, _ = routers[name]
            numbers = np.ascontiguousarray(tensor.float().numpy().reshape(-1))
            found[name] = (dtype, shape, encode(numbers, dtype=dtype))
    return found


def write_parts(plan: Plan, weights: Weights, folder: Path, *, out: Path) -> dict[str, Any]:
    """Writes adapters and whole tensors into `folder`, which will become `out`; returns the recipe that names them.

    Relative paths in the recipe start at `out`.
    """
    names = _adapter_names(plan, weights)
    for path, name in names.items():
        write_adapter(folder / ADAPTERS / name, _terms(plan, weights, path), base=source_path(plan, path))
    whole = _whole(plan, weights)
    if whole:
        write_atomic(folder / TRAINED, save(whole, metadata={"format": "pt"}))
    recipe = moved_recipe(plan.recipe, out=out, adapters={path: f"{ADAPTERS}/{name}" for path, name in names.items()})
    recipe["routers"] = ROUTERS
    if whole:
        recipe["trained"] = TRAINED
    return recipe


def _parsed(weights: Weights, kind: str) -> dict[tuple[str, ...], torch.Tensor]:
    """The tensors of one kind, keyed by the rest of their names, split at the slashes."""
    found = (key.split("/") for key in weights)
    return {tuple(rest): weights["/".join((head, *rest))] for head, *rest in found if head == kind}


def _path(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _adapter_names(plan: Plan, weights: Weights) -> dict[tuple[int, ...] | None, str]:
    """Path of every expert with a trained adapter (None: the backbone) -> the name of its folder."""
    wanted: list[tuple[int, ...] | None] = [None] if _parsed(weights, "attention") else []
    wanted += dict.fromkeys(_path(path) for path, *_ in _parsed(weights, "adapter"))
    return adapter_names(plan, wanted)


def _terms(plan: Plan, weights: Weights, path: tuple[int, ...] | None) -> Terms:
    """The adapter of one expert, or of the backbone; the latter keeps earlier terms on layers that were not trained."""
    if path is None:
        kept = {
            write.name.removesuffix(".weight"): step
            for write in plan.backbone
            for step in write.steps
            if isinstance(step, LowRank)
        }
        old = {name: (_values(step.a), _values(step.b) * step.scale) for name, step in kept.items()}
        parts = _parsed(weights, "attention")
        return old | {name: (parts[name, "a"], parts[name, "b"]) for name, key in parts if key == "a"}
    scales = scales_of(plan)
    parts = _parsed(weights, "adapter")
    text = ".".join(map(str, path))
    return {
        name: (parts[own, name, "a"], parts[own, name, "b"] / scales[path, f"{name}.weight"])
        for own, name, key in parts
        if own == text and key == "a"
    }


def _values(ref: Any) -> torch.Tensor:
    return torch.from_numpy(values(ref))


def _whole(plan: Plan, weights: Weights) -> dict[str, torch.Tensor]:
    """Norms, embeddings and experts, including those that an earlier run trained."""
    files = dict.fromkeys(ref.file for ref in plan.trained)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for kind in ("norm", "embedding"):
        found |= {name: tensor for (name,), tensor in _parsed(weights, kind).items()}
    scales = scales_of(plan)
    for (path, name), tensor in _parsed(weights, "expert").items():
        found[trained_name(_path(path), name)] = tensor / scales[_path(path), name]
    return {name: tensor.contiguous() for name, tensor in found.items()}
