"""A recipe with other paths: for another folder, or for the place where its sources are."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from frankenmoe import system
from frankenmoe.recipe.expert import Expert
from frankenmoe.recipe.model import Recipe
from frankenmoe.recipe.sourcename import SourceName

Adapters = Mapping[tuple[int, ...] | None, str]
"""Path of an expert (None: the backbone) -> the folder of its adapter."""


def moved_recipe(recipe: Recipe, *, out: Path, adapters: Adapters) -> dict[str, Any]:
    """The recipe with paths relative to `out`, and with new adapters instead of old ones."""

    def there(path: str) -> str:
        known = not os.path.isabs(path) and os.path.exists(recipe.folder / path)
        return system.relative(recipe.folder / path, out) if known else path

    return _with_paths(recipe, there, adapters)


def found_recipe(recipe: Recipe, *, where: Path) -> dict[str, Any] | None:
    """The recipe with absolute paths for what is not in its own folder, but at the same place relative to `where`.

    None if there is no such path.
    """
    found: set[str] = set()

    def there(path: str) -> str:
        other = os.path.normpath(where / path)
        if os.path.isabs(path) or os.path.exists(recipe.folder / path) or not os.path.exists(other):
            return path
        found.add(other)
        return other

    table = _with_paths(recipe, there, {})
    return table if found else None


def _with_paths(recipe: Recipe, there: Callable[[str], str], adapters: Adapters) -> dict[str, Any]:
    """The recipe with every path through `there`, but for those of `adapters`."""

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
    for key in ("routers", "trained"):
        if key in data:
            data[key] = there(data[key])
    return data
