"""Artifact -> its recipe and plan, from the record. Checks that the sources have not changed."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import Artifact
from frankenmoe.checkpoint.fingerprint import fingerprint, sha256
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.planning.make import plan
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.backbone import BASE
from frankenmoe.recipe.moved import found_recipe


def plan_of(artifact: Artifact, *, known: Plan | None = None, trust_remote_code: bool = False) -> Plan:
    """Plans the recorded recipe. ArtifactError if its sources have changed or are missing.

    `known` is a plan of the same recipe and dtype, which is used again if its files have not changed.
    """
    recipe = recipe_of(artifact)
    if known is not None and known.digest_now() == known.digest:
        made = replace(known, recipe=recipe, measured=None)
        check_sources(artifact, made)
        return made
    try:
        made = plan(
            recipe,
            dtype=artifact.record["dtype"],
            weights=True,
            trust_remote_code=trust_remote_code,
            inside=artifact.folder,
        )
    except SourceError as error:
        raise ArtifactError(
            f"the sources of {artifact.folder} cannot be used any more: {error.message}",
            hint=f"relative paths start at {recipe.folder}; restore the sources there, or build the artifact again",
        ) from error
    check_sources(artifact, made)
    return made


def facts(made: Plan) -> dict[str, Any]:
    """The facts in a record with which a built artifact loads without its sources."""
    return {
        "dtype": made.dtype_name,
        "format": made.fmt.name if made.fmt else None,
        "base_config": dict(made.base.config),
        "experts": [node.name for node in made.nodes],
        "shared_experts": [node.name for node in made.shared],
        "experts_per_token": made.recipe.experts_per_token,
    }


def recipe_of(artifact: Artifact) -> Recipe:
    """The recipe in an artifact's record; if the artifact was moved, its paths are those of today.

    Paths start at the recipe's folder, or, if that is the artifact itself or is gone, at the same place seen from where
    the artifact is now. What is not there, but where it was when the artifact was made, gets an absolute path.
    """
    record = artifact.record
    was, now = Path(record["recipe_folder"]), (artifact.folder / record["recipe_folder_from_here"]).resolve()
    inside = record["recipe_folder_from_here"] == os.curdir
    # records from before there was a choice do not say that the backbone is the base's
    table = {**record["recipe"], "backbone": record["recipe"].get("backbone", BASE)}
    recipe = _parsed(artifact, table, now if inside or not was.is_dir() else was)
    if not was.is_absolute() or recipe.folder == was.resolve():
        return recipe
    found = found_recipe(recipe, where=was)
    return recipe if found is None else _parsed(artifact, found, recipe.folder)


def _parsed(artifact: Artifact, table: Mapping[str, Any], folder: Path) -> Recipe:
    text = yaml.safe_dump(dict(table), sort_keys=False)
    return Recipe.parse(text, folder=folder, origin=str(artifact.folder / "recipe.yml"))


def check_sources(artifact: Artifact, made: Plan) -> None:
    """Raises ArtifactError if the plan's files are not those in the record.

    Compares weights by fingerprint, configs and tokenizer by SHA-256.
    """
    recorded = artifact.record["sources"]
    if len(recorded) != len(made.source_files):
        raise ArtifactError(
            f"{artifact.folder} was made from {len(recorded)} weight files, found {len(made.source_files)}",
            hint="a source has changed; build the artifact again",
        )
    for file, was in zip(made.source_files, recorded, strict=True):
        if fingerprint(file) != was["fingerprint"]:
            raise ArtifactError(
                f"{file} changed since {artifact.folder} was made: expected {was['bytes']} bytes with fingerprint "
                f"{was['fingerprint']}",
                hint="a source has changed; restore it, or build the artifact again",
            )
    configs = artifact.record["configs"]
    now = [file.name for file in made.deciding_files]
    if [Path(was["file"]).name for was in configs] != now:
        raise ArtifactError(
            f"the configs and tokenizer files of {artifact.folder} changed since it was made: found {', '.join(now)}",
            hint="a source has changed; restore its files, or build the artifact again",
        )
    for file, was in zip(made.deciding_files, configs, strict=True):
        if sha256(file) != was["sha256"]:
            raise ArtifactError(
                f"{file} changed since {artifact.folder} was made: expected SHA-256 {was['sha256']}",
                hint="a source has changed; restore it, or build the artifact again",
            )
