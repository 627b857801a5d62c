"""Plan -> the record of an artifact, frankenmoe.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frankenmoe import system
from frankenmoe.artifact.folder import STATISTICS
from frankenmoe.artifact.record import BACKBONE
from frankenmoe.artifact.reports import versions
from frankenmoe.checkpoint.fingerprint import fingerprint, sha256
from frankenmoe.checkpoint.header import read_metadata
from frankenmoe.errors import ArtifactError
from frankenmoe.planning import Plan
from frankenmoe.planning.asadapter import copied_to
from frankenmoe.planning.recall import facts
from frankenmoe.progress import Progress
from frankenmoe.recipe import Recipe

STAGES = "frankenmoe.stages.json"  # beside a recipe.yml that `heal:` has written: what was done before


def record_of(
    made: Plan,
    out: Path,
    *,
    folder: Path,
    virtual: bool,
    progress: Progress,
    stage: str = "build",
    known: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of frankenmoe.json: the recipe, the sources with their hashes, and what was done.

    `folder` is the unfinished artifact. `known` maps fingerprints of files that were hashed before to their SHA-256.
    """
    files, known, extracted = made.source_files, known or {}, made.extracted.values()
    if virtual:
        wanted = (file for file in files if fingerprint(file) not in known)
        progress.start("hashing sources", sum(file.stat().st_size for file in wanted), "B")
    return {
        "form": "virtual" if virtual else "built",
        "name": made.recipe.name,
        "recipe": made.recipe.to_dict(),
        "recipe_folder": str(made.recipe.folder),
        "recipe_folder_from_here": system.relative(made.recipe.folder, out),
        "recipe_digest": made.recipe.digest,
        "seed": made.recipe.seed,
        **facts(made),
        "sources": [
            {
                "file": str(copied_to(file, extracted, out)),
                "bytes": file.stat().st_size,
                "fingerprint": fingerprint(file),
                "sha256": (known.get(fingerprint(file)) or sha256(file, on_bytes=progress.advance))
                if virtual
                else None,
            }
            for file in files
        ],
        "configs": [
            {"file": str(copied_to(file, extracted, out)), "sha256": sha256(file)} for file in made.deciding_files
        ],
        "stages": [
            *backbone_stage(made),
            {"stage": stage, "gate_mode": made.recipe.gate_mode, **_fit_report(folder), "versions": versions()},
        ],
    }


def backbone_stage(made: Plan) -> list[dict[str, Any]]:
    """The entry of the measurement that chose the backbone; none if there was no measurement."""
    return [] if made.measured is None else [{"stage": BACKBONE, **made.measured, "versions": versions()}]


def stages_beside(recipe: Recipe) -> list[dict[str, Any]]:
    """What an earlier stage did to a recipe that was written by it: the entries in STAGES, else none."""
    file = recipe.folder / STAGES
    return list(json.loads(file.read_bytes())["stages"]) if file.is_file() else []


def _fit_report(folder: Path) -> dict[str, Any]:
    """The fit's report, read from the statistics file, because it must survive a killed and resumed run."""
    if not (folder / STATISTICS).exists():
        return {}
    facts = read_metadata(folder / STATISTICS).get("facts")
    if facts is None:
        raise ArtifactError(f"{folder / STATISTICS} is damaged: it has no facts", hint="fit the routers again")
    return {"fit": json.loads(facts)}
