"""Merged backbone tensors of a recipe's plan, copied into the artifact that is made of it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import ROUTERS
from frankenmoe.checkpoint.writer import partial_of
from frankenmoe.planning import Plan
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.moved import moved_recipe

BACKBONE = "backbone.safetensors"  # other programs take every `model*.safetensors` for a part of a built model


def with_own_backbone(made: Plan, partial: Path, *, out: Path) -> dict[str, Any] | None:
    """Copies the tensors of a measured backbone, or of a plan that carries some, into `partial`, which becomes `out`.

    Returns the recipe that names the copy, with paths relative to `out`; None if there is nothing to copy.
    """
    if made.recipe.trained is None or (made.measured is None and not made.carried):
        return None
    copy = partial / BACKBONE
    shutil.copyfile(made.recipe.trained, partial_of(copy))
    partial_of(copy).replace(copy)
    table = moved_recipe(made.recipe, out=out, adapters={})
    return table | {"trained": BACKBONE} | ({"routers": ROUTERS} if made.recipe.routers else {})


def moved_record(record: Mapping[str, Any], made: Plan, table: Mapping[str, Any], *, out: Path) -> dict[str, Any]:
    """What a record with the recipe `table` says otherwise than one with the plan's recipe."""
    there = {str(made.recipe.trained): str(out / BACKBONE)}
    recipe = Recipe.parse(yaml.safe_dump(dict(table)), folder=out, origin=str(out / "recipe.yml"))
    return {
        "recipe": recipe.to_dict(),
        "recipe_folder": str(out),
        "recipe_folder_from_here": os.curdir,
        "recipe_digest": recipe.digest,
        "sources": [{**each, "file": there.get(each["file"], each["file"])} for each in record["sources"]],
    }
