"""A virtual artifact derived from another MoE: its recipe, its record and PEFT adapters beside them."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from frankenmoe.build.body import copy_small_files
from frankenmoe.build.record import record_of
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.moe.load import residual_scale
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.asadapter import on_base
from frankenmoe.planning.tree import PEFT_PREFIX
from frankenmoe.progress import Progress
from frankenmoe.recipe import Expert, Recipe, SourceName
from frankenmoe.subject import Subject

ADAPTERS = "adapters"
BACKBONE = "backbone"  # the adapter on the base
Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Dense name of a linear layer -> A and B of its adapter, with scale 1."""


def adapter_names(plan: Plan, paths: Sequence[tuple[int, ...] | None]) -> dict[tuple[int, ...] | None, str]:
    """Path of every expert with an adapter of its own (None: the backbone) -> the name of its folder."""
    titles = {leaf.path: leaf.name for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()}
    found: dict[tuple[int, ...] | None, str] = {}
    for path in paths:
        stem = BACKBONE if path is None else re.sub(r"[^\w.-]+", "-", titles[path]).strip(".") or "expert"
        name = stem if stem not in found.values() else f"{stem}-{'.'.join(map(str, path or ()))}"
        found[path] = name
    return found


def scales_of(plan: Plan) -> dict[tuple[tuple[int, ...], str], float]:
    """(expert, dense name) -> the factor that the plan applies to that tensor last."""
    leaves = [leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves()]
    return {
        (leaf.path, write.name): residual_scale(write) for leaf in leaves for row in leaf.ffn for write in row.values()
    }


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


def moved_recipe(recipe: Recipe, *, out: Path, adapters: Mapping[tuple[int, ...] | None, str]) -> dict[str, Any]:
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


def virtual_record(
    subject: Subject, table: Mapping[str, Any], partial: Path, *, out: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the recipe `table` and the small files into `partial`, which will become `out`; returns the record.

    Sources that the subject's artifact has hashed are not hashed again. `stages` and `files` are the caller's.
    """
    text = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True)
    write_atomic(partial / "recipe.yml", text.encode())
    copy_small_files(subject.plan, partial)
    # planned in the partial folder, which is next to `out`, so relative paths are valid in both
    derived = Recipe.load(partial / "recipe.yml")
    made = plan(
        derived,
        dtype=subject.plan.dtype,
        weights=True,
        trust_remote_code=subject.trust_remote_code,
        inside=partial,
    )
    known = subject.artifact.record["sources"] if subject.artifact else []
    record = record_of(
        made,
        out,
        folder=partial,
        virtual=True,
        progress=progress,
        known={each["fingerprint"]: each["sha256"] for each in known},
    )
    inside, final = f"{partial}{os.sep}", f"{out}{os.sep}"
    for each in (*record["sources"], *record["configs"]):
        each["file"] = final + each["file"].removeprefix(inside) if each["file"].startswith(inside) else each["file"]
    return record | {"recipe_folder": str(out), "recipe_folder_from_here": "."}
