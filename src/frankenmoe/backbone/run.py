"""Recipe or artifact -> a virtual artifact whose experts are refitted to its backbone."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import (
    ROUTERS,
    STATISTICS,
    Artifact,
    become,
    finish,
    open_artifact,
    refuse_occupied,
    small_hashes,
    write_json,
    write_routers,
)
from frankenmoe.artifact.healing import HealReport
from frankenmoe.artifact.record import HEAL
from frankenmoe.artifact.reports import versions
from frankenmoe.backbone.healed import REPORT, Patient, heal_all, patients_of
from frankenmoe.build.derived import growing_once, virtual_record
from frankenmoe.build.record import STAGES, backbone_stage
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.given import Texts, located, user_path
from frankenmoe.gates.made import MadeRouters
from frankenmoe.moe.device import AUTO, resolve
from frankenmoe.moe.processes import wait
from frankenmoe.planning.buildable import check_buildable, check_parents
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.sections import HealSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_subject


@dataclass(frozen=True)
class Healed:
    """The new artifact, and what healing did to each expert."""

    artifact: Artifact
    report: HealReport

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"artifact": str(self.artifact.folder), **self.report.to_dict()}


def heal(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    data: Texts | None = None,
    settings: HealSettings | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> Healed:
    """Refits every expert's down projections so that the MoE's states follow its parent's, into a virtual artifact.

    `data` maps names of experts to files or datasets and replaces the recipe's data; relative paths start at the
    working directory. `changes` are settings by name. Models run on `device` and compute in `dtype`, by default as in
    `fit`. An expert is left as it is unless its held-out loss falls by more than one standard error. The routers of a
    recipe are made afterwards; those of an artifact are kept. A built artifact needs its sources, and the result is
    virtual too. If killed, the same call continues after the last finished expert. Several processes of torchrun share
    the text; the first one writes.
    """
    out, place = Path(os.path.realpath(out)), resolve(device)
    refuse_occupied(out)
    subject, settings, patients, digest = _prepared(
        open_subject(what).resolved(progress, device=device), settings, changes, data, dtype
    )
    with growing_once(out, digest=digest) as partial:
        found = heal_all(
            subject.plan, patients, settings, partial, out=out, device=place, dtype=dtype, progress=progress
        )
        if found:
            # planned in the partial folder, which is next to `out`, so relative paths are valid in both
            _write_recipe(found[0], partial)
        wait()
        made = _routers(subject, partial, device=device, progress=progress)
        if found:
            _finish(subject, *found, made, partial, out=out, progress=progress)
    wait()
    return Healed(open_artifact(out), HealReport.read(out / REPORT))


def heal_recipe(
    what: Subject | Recipe | str | Path,
    out: str | Path,
    *,
    settings: HealSettings,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> HealReport:
    """Like `heal`, but `out` holds only recipe.yml, the tensors that it names and STAGES, so no routers are made."""
    out, place = Path(os.path.realpath(out)), resolve(device)
    subject, settings, patients, digest = _prepared(
        open_subject(what).resolved(progress, device=device), settings, {}, None, dtype
    )
    with growing_once(out, digest=f"{digest}/recipe") as partial:
        found = heal_all(
            subject.plan, patients, settings, partial, out=out, device=place, dtype=dtype, progress=progress
        )
        if found:
            table, report = found
            _write_recipe(table, partial)
            write_json(partial / STAGES, {"stages": [*backbone_stage(subject.plan), _stage(subject, report)]})
            become(partial, out)
    wait()
    return HealReport.read(out / REPORT)


def _prepared(
    what: Subject | Recipe | Artifact | str | Path,
    settings: HealSettings | None,
    changes: Mapping[str, Any],
    data: Texts | None,
    dtype: str | None,
) -> tuple[Subject, HealSettings, tuple[Patient, ...], str]:
    """What is to be healed, how, from which text, and the digest of all of it."""
    subject = open_subject(what)
    settings = settings_with(settings or subject.recipe.heal or HealSettings(), changes)
    plan = subject.plan
    if subject.artifact is None:
        check_buildable(plan, virtual=True, allow_identical=True)
    check_parents(plan, doing="healing", hint="train the experts in place of it: frankenmoe train --what experts")
    patients = patients_of(plan, settings, data=located(data or {}))
    texts = [[patient.name, _states(patient, folder=plan.recipe.folder)] for patient in patients]
    routers = subject.artifact and sha256(subject.artifact.folder / ROUTERS)
    facts = [plan.digest, routers, settings.model_dump(mode="json"), texts, dtype]
    return subject, settings, patients, hashlib.sha256(json.dumps(facts).encode()).hexdigest() + "/heal"


def _states(patient: Patient, *, folder: Path) -> list[Any]:
    """The files and datasets of an expert's text, files with their size and time."""
    files = [Path(user_path(name, folder=folder)) for name in (patient.text.origin if patient.text else ())]
    stats = [file.stat() if file.is_file() else None for file in files]
    return [[str(file), stat and [stat.st_size, stat.st_mtime_ns]] for file, stat in zip(files, stats, strict=True)]


def _write_recipe(table: Mapping[str, Any], folder: Path) -> None:
    text = yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=True)
    write_atomic(folder / "recipe.yml", text.encode())


def _stage(subject: Subject, report: HealReport) -> dict[str, Any]:
    """The entry in the record of an artifact."""
    return {
        "stage": HEAL,
        "from": subject.origin,
        "settings": report.settings,
        "data": report.data,
        "text": {part.name: {"tokens": part.tokens, "block": part.block, "spans": part.spans} for part in report.tried},
        "kept": [expert.name for expert in report.kept],
        "held_out_loss": report.means,
        "versions": versions(),
    }


def _routers(subject: Subject, partial: Path, *, device: str, progress: Progress) -> MadeRouters:
    """An artifact's own routers, or those of the healed recipe in `partial`."""
    if subject.artifact:
        return subject.routers(progress)
    recipe = Recipe.load(partial / "recipe.yml")
    healed = Subject(recipe, dtype=subject.plan.dtype, trust_remote_code=subject.trust_remote_code, cache=False)
    return healed.routers(progress, device=device)


def _finish(
    subject: Subject,
    table: dict[str, Any],
    report: HealReport,
    made: MadeRouters,
    partial: Path,
    *,
    out: Path,
    progress: Progress,
) -> None:
    """Writes routers and record, and turns the partial folder into the artifact."""
    if subject.artifact:
        table["routers"] = ROUTERS
    elif made.statistics is not None:
        write_atomic(partial / STATISTICS, made.statistics)
    write_routers(partial, made.routers)
    record = virtual_record(subject, table, partial, out=out, progress=progress)
    stage = _stage(subject, report)
    if subject.artifact:
        stages = [*subject.artifact.record["stages"], stage]
    else:
        stages = [*backbone_stage(subject.plan), stage, {**record["stages"][-1], "stage": "routers"}]
    finish(partial, out, record=record | {"stages": stages, "files": small_hashes(partial)})
