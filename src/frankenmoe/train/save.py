"""Writes trained weights as files of an artifact: gates, PEFT adapters, whole tensors, and the recipe naming them."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from frankenmoe.artifact.folder import ROUTERS, Routers
from frankenmoe.checkpoint.cast import encode
from frankenmoe.checkpoint.tensors import LowRank
from frankenmoe.checkpoint.values import values
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.moe.load import residual_scale
from frankenmoe.planning import Plan
from frankenmoe.planning.trained import TRAINED, trained_name
from frankenmoe.planning.tree import PEFT_PREFIX
from frankenmoe.recipe import Expert, Recipe, SourceName

ADAPTERS = "adapters"
BACKBONE = "backbone"  # the adapter on the base
Weights = Mapping[str, torch.Tensor]
Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Dense name of a linear layer -> A and B of its adapter, with scale 1."""


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
        _write_adapter(folder / ADAPTERS / name, _terms(plan, weights, path), base=_base_of(plan, path))
    whole = _whole(plan, weights)
    if whole:
        write_atomic(folder / TRAINED, save(whole, metadata={"format": "pt"}))
    recipe = _moved(plan.recipe, out=out, adapters={path: f"{ADAPTERS}/{name}" for path, name in names.items()})
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
    titles = {leaf.path: leaf.name for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()}
    wanted: list[tuple[int, ...] | None] = [None] if _parsed(weights, "attention") else []
    wanted += dict.fromkeys(_path(path) for path, *_ in _parsed(weights, "adapter"))
    found: dict[tuple[int, ...] | None, str] = {}
    for path in wanted:
        stem = BACKBONE if path is None else re.sub(r"[^\w.-]+", "-", titles[path]).strip(".") or "expert"
        name = stem if stem not in found.values() else f"{stem}-{'.'.join(map(str, path or ()))}"
        found[path] = name
    return found


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
    scales = _scales(plan)
    parts = _parsed(weights, "adapter")
    text = ".".join(map(str, path))
    return {
        name: (parts[own, name, "a"], parts[own, name, "b"] / scales[path, f"{name}.weight"])
        for own, name, key in parts
        if own == text and key == "a"
    }


def _values(ref: Any) -> torch.Tensor:
    return torch.from_numpy(values(ref))


def _scales(plan: Plan) -> dict[tuple[tuple[int, ...], str], float]:
    """(expert, dense name) -> the factor that the plan applies to that tensor last."""
    leaves = [leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()]
    return {
        (leaf.path, write.name): residual_scale(write) for leaf in leaves for row in leaf.ffn for write in row.values()
    }


def _whole(plan: Plan, weights: Weights) -> dict[str, torch.Tensor]:
    """Norms, embeddings and experts, including those that an earlier run trained."""
    files = dict.fromkeys(ref.file for ref in plan.trained)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for kind in ("norm", "embedding"):
        found |= {name: tensor for (name,), tensor in _parsed(weights, kind).items()}
    scales = _scales(plan)
    for (path, name), tensor in _parsed(weights, "expert").items():
        found[trained_name(_path(path), name)] = tensor / scales[_path(path), name]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _base_of(plan: Plan, path: tuple[int, ...] | None) -> str:
    leaves = [leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()]
    source = plan.base if path is None else next(leaf.source for leaf in leaves if leaf.path == path)
    assert source is not None
    return source.name.path


def _write_adapter(folder: Path, terms: Terms, *, base: str) -> None:
    """Writes a LoRA in PEFT's format, loadable by peft.PeftModel.from_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: a.shape[0] for name, (a, _) in terms.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": {re.escape(name): rank for name, rank in others.items()},
        "alpha_pattern": {re.escape(name): rank for name, rank in others.items()},
        "target_modules": sorted(terms),
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{letter}.weight": tensor.contiguous()
        for name, pair in terms.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    write_atomic(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def _moved(recipe: Recipe, *, out: Path, adapters: Mapping[tuple[int, ...] | None, str]) -> dict[str, Any]:
    """The recipe with paths relative to `out`, and with new adapters instead of old ones."""

    def there(path: str) -> str:
        known = not os.path.isabs(path) and os.path.exists(recipe.folder / path)
        return os.path.relpath(recipe.folder / path, out) if known else path

    def source(name: SourceName, adapter: str | None) -> Any:
        own = name.adapter if name.adapter is None else there(name.adapter)
        moved = replace(name, path=there(name.path), adapter=own)
        if adapter is not None:
            moved = replace(moved, adapter=adapter, adapter_revision=None)
        return moved.to_data()

    def expert(entry: Expert, table: dict[str, Any], path: tuple[int, ...]) -> dict[str, Any]:
        new = dict(table)
        if entry.experts:
            inner = zip(entry.experts, table["experts"], strict=True)
            new["experts"] = [expert(each, row, (*path, index)) for index, (each, row) in enumerate(inner)]
        if entry.merge is not None:
            models = [source(name, None) for name in entry.merge.models]
            base = {} if entry.merge.base is None else {"base": source(entry.merge.base, None)}
            new["merge"] = {**table["merge"], "models": models, **base}
        if entry.source_model is not None:
            plain = replace(entry.source_model, adapter=None, adapter_revision=None)
            new["source_model"] = source(plain if path in adapters else entry.source_model, None)
        if path in adapters:
            new["adapter"] = adapters[path]
        elif entry.adapter is not None:
            new["adapter"] = there(entry.adapter)
        if entry.data:
            new["data"] = [there(name) for name in entry.data]
        return new | {"name": entry.name}

    data = recipe.to_dict()
    data["base_model"] = source(recipe.base_model, adapters.get(None))
    for key, entries, start in (("experts", recipe.experts, ()), ("shared_experts", recipe.shared_experts, (-1,))):
        if key in data:
            rows = zip(entries, data[key], strict=True)
            data[key] = [expert(each, row, (*start, index)) for index, (each, row) in enumerate(rows)]
    return data
