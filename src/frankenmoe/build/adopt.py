"""The folder of a finished mixture -> an artifact. Never changes the weights.

The artifact is virtual: a record, a recipe and the routers, beside the weights or in a folder of their own. Paths in
the recipe start at that folder.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import (
    RECORD,
    ROUTERS,
    Artifact,
    finish,
    growing,
    open_artifact,
    record_bytes,
    refuse_occupied,
    routers_bytes,
    small_hashes,
)
from frankenmoe.artifact.record import ADOPT
from frankenmoe.artifact.replacing import finish_replacing, replace_files
from frankenmoe.build.agreement import agree
from frankenmoe.build.backbone import moved_record
from frankenmoe.build.proof import prove_sources
from frankenmoe.build.record import record_of
from frankenmoe.build.target import target_of
from frankenmoe.build.virtual import copy_virtual_files
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.links import SNAPSHOTS
from frankenmoe.checkpoint.weights import INDEX, NAMED, SINGLE
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError
from frankenmoe.gates.kept import kept_routers
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.adopting import MERGEKIT, NOTHING, Named, mixture_in, on_hub, recipe_of_mixture
from frankenmoe.planning.mixture import Mixture
from frankenmoe.planning.pairing import Pair, paired
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.moved import moved_recipe

RECIPE = "recipe.yml"


@dataclass(frozen=True)
class Adopted:
    """An adopted mixture: its artifact, and the stage in its record that says where it comes from."""

    artifact: Artifact
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"artifact": str(self.artifact.folder), "form": self.artifact.form, **self.facts}


def adopt(
    what: str | Path, out: str | Path | None = None, *, recipe: str | Path | None = None, progress: Progress = SILENT
) -> Adopted:
    """Makes an artifact of a mixture that another program made or trained: a folder, or a hub id with `out`.

    Without `out`, the folder itself becomes the artifact: a record, a recipe and a file of routers are added. With it,
    `out` gets these and the tokenizer, and reads the weights where they are. With `recipe`, the experts are paired by
    content with those it was made from, and have their names, prompts and data; else they are expert-0 and so on.
    Raises ArtifactError or SourceError for anything else than a whole mixture in a known format.
    """
    what = str(what)
    if out is None:
        finish_replacing(Path(what))  # of an adoption that was killed
    _refuse_artifact(Path(what))
    out = None if out is None else Path(os.path.realpath(out))
    if out is not None:
        refuse_occupied(out)
    mixture = mixture_in(what)
    if out is None:
        _check_place(mixture, what)
    made_from = Recipe.load(recipe) if recipe is not None else None
    named, pairs = _paired(what, mixture, made_from, out) if made_from is not None else (NOTHING, ())
    made = plan(recipe_of_mixture(what, mixture, named=named, inside=out is None), weights=True)
    agree(target_of(made, virtual=True))
    prove_sources(made, progress)
    stage = _origin(mixture, made, made_from, pairs)
    folder = mixture.checkpoint.folder
    table = moved_recipe(made.recipe, out=out or folder, adapters={})
    files = {
        ROUTERS: routers_bytes(kept_routers(made)),
        RECIPE: yaml.safe_dump(table, sort_keys=False, allow_unicode=True).encode(),
    }
    if out is None:
        record = _record(made, folder, folder, stage, progress)
        small = {file.name: sha256(file) for file in made.deciding_files}
        record["files"] = small | {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
        replace_files(folder, {**files, RECORD: record_bytes(record)})
        return Adopted(open_artifact(folder), stage)
    with growing(out, digest=f"{made.digest}/{ADOPT}") as partial:
        copy_virtual_files(made, partial)
        for name, raw in files.items():
            write_atomic(partial / name, raw)
        record = _record(made, out, partial, stage, progress)
        record |= moved_record(record, made, table, out=out)
        return Adopted(finish(partial, out, record=record | {"files": small_hashes(partial)}), stage)


def _record(made: Plan, out: Path, folder: Path, stage: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    record = record_of(made, out, folder=folder, virtual=True, stage=ADOPT, progress=progress)
    (own,) = record["stages"]
    return record | {"stages": [{**own, **stage}]}


def _refuse_artifact(folder: Path) -> None:
    if (folder / RECORD).is_file():
        raise ArtifactError(
            f"{folder} is an artifact already: it holds a {RECORD}",
            hint=f"use it as it is; if another program has changed its weights since, move {RECORD} and {ROUTERS} away",
        )


def _check_place(mixture: Mixture, what: str) -> None:
    """Raises ArtifactError if the record and the routers cannot lie beside these weights."""
    folder = mixture.checkpoint.folder
    taken = next((name for name in (RECIPE, ROUTERS) if os.path.lexists(folder / name)), None)
    usual = mixture.checkpoint.config.get(NAMED) or any((folder / name).is_file() for name in (SINGLE, INDEX))
    if taken is not None:
        reason = f"holds a {taken}, and adopting it would write another one"
    elif on_hub(what) or folder.parent.name == SNAPSHOTS:
        reason = "is in the hub's cache, which should stay as it is"
    elif not os.access(folder, os.W_OK):
        reason = "cannot be written to"
    elif not usual:
        reason = f"has neither {SINGLE} nor {INDEX}, so a further file would be taken for weights"
    else:
        return
    raise ArtifactError(f"{what} {reason}", hint=f"give a folder of its own: frankenmoe adopt {what} OUT")


def _paired(what: str, mixture: Mixture, made_from: Recipe, out: Path | None) -> tuple[Named, Sequence[Pair]]:
    """The names that a recipe gives, in the mixture's order, and the pairs behind them."""
    alone = recipe_of_mixture(what, mixture)
    pairs = paired(plan(alone, weights=True), plan(made_from, weights=True))
    start = mixture.checkpoint.folder if out is None else alone.folder
    moved = moved_recipe(made_from, out=start, adapters={})
    rows = [moved["experts"][pair.expert] for pair in pairs]
    shared = moved.get("shared_experts") or [{}]
    return Named(rows, shared[0], made_from.name), pairs


def _origin(mixture: Mixture, made: Plan, made_from: Recipe | None, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What is known of where a mixture comes from: for the record and the user."""
    folder, config = mixture.checkpoint.folder, mixture.checkpoint.config
    saved = config.get("transformers_version")
    parents = [str(expert.source_model or expert.merge) for expert in (made_from.experts if made_from else ())]
    experts = [
        {
            "name": node.name,
            "index": index,
            **({"made_from": parents[pairs[index].expert]} if pairs else {}),
            **({"distance": pairs[index].distance, "next": pairs[index].other} if pairs else {}),
        }
        for index, node in enumerate(made.nodes)
    ]
    return {
        "from": str(mixture.name) if on_hub(str(mixture.name)) else str(folder),
        "format": mixture.fmt.name,
        "saved_by": f"transformers {saved}" if saved else None,
        "mergekit": (folder / MERGEKIT).is_file(),
        "recipe": Path(made_from.origin).name if made_from else None,
        "experts": experts,
        "shared_experts": [node.name for node in made.shared],
        "experts_per_token": made.recipe.experts_per_token,
    }
