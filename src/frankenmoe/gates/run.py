"""Fits the routers of an artifact or a recipe, and adds experts to artifacts with fitted routers.

Never changes the weights of an artifact. Replaces routers, statistics and record together or not at all.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact.folder import (
    RECORD,
    ROUTERS,
    STATISTICS,
    Artifact,
    open_artifact,
    record_bytes,
    refuse_occupied,
    routers_bytes,
)
from frankenmoe.artifact.replacing import finish_replacing, replace_files
from frankenmoe.artifact.reports import versions
from frankenmoe.build.run import build
from frankenmoe.checkpoint.hub import is_folder, local_path
from frankenmoe.data.given import Texts, located
from frankenmoe.errors import PlanError, RecipeError
from frankenmoe.gates.add import add_text
from frankenmoe.gates.closed import CLOSED
from frankenmoe.gates.fitted import computing_dtype, fit_plan
from frankenmoe.gates.made import MadeRouters
from frankenmoe.gates.statistics import load_statistics
from frankenmoe.moe.device import AUTO, resolve
from frankenmoe.moe.load import gate_tensors
from frankenmoe.moe.processes import is_main, main_first, wait, world
from frankenmoe.planning import Plan
from frankenmoe.planning.backbone import kept_beside
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import FIT_MODES, Recipe
from frankenmoe.recipe.gatemodes import FROM_DATA
from frankenmoe.recipe.model import default_gate_mode
from frankenmoe.recipe.sections import FitSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_subject


@dataclass(frozen=True)
class FitResult:
    """`replaced` says whether the artifact has the new routers; `report` is the fit's entry in its record."""

    artifact: Artifact
    replaced: bool
    report: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"artifact": str(self.artifact.folder), "replaced": self.replaced, **self.report}


def fit(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path | None = None,
    *,
    data: Texts | None = None,
    settings: FitSettings | None = None,
    keep_anyway: bool = False,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> FitResult:
    """Fits every router to the experts' text: of an artifact in place, of a recipe into a virtual artifact `out`.

    `data` maps names of experts to files or datasets and replaces the recipe's data; relative paths start at the
    working directory. `settings` are by default the recipe's `fit`; `changes` are settings by name. The default method
    is the recipe's gate mode if it fits routers, else regret for data and logistic for prompts. An artifact keeps its
    old routers if the new ones do not lower the mean held-out loss, unless `keep_anyway` is set or the old ones were
    fitted to these held-out prompts. The model runs on `device` and computes in `dtype`, by default as stored on a GPU,
    and in float32 on a CPU with enough memory.
    """
    subject = open_subject(what)
    settings = settings_with(settings or subject.recipe.fit_settings, changes)
    given = located(data or {})
    method = settings.method or _method(subject.recipe, given)
    if subject.artifact is None:
        place = {"device": device, "dtype": dtype}
        return _fit_recipe(subject, out, method=method, data=given, settings=settings, progress=progress, **place)
    if out is not None:
        raise PlanError(
            f"{subject.origin} is an artifact, whose routers are replaced in place: expected no second folder, "
            f"found {out}",
            hint="copy the artifact first if you still need the old routers",
        )
    artifact = subject.artifact
    with main_first():
        if is_main():
            finish_replacing(artifact.folder)
    made = subject.plan
    moe = subject.load(dtype=dtype or computing_dtype(made, resolve(device)), device=device, by_layer=True)
    fitted = fit_plan(
        made,
        method=method,
        moe=moe,
        data=given,
        folder=Path.cwd(),
        settings=settings,
        together=world() > 1,
        progress=progress,
    )
    replaced = fitted.better or keep_anyway or _biased(artifact, fitted.report)
    wait()  # all of them have read what is now replaced
    if replaced and is_main():
        stage = {"stage": "fit", "fit": fitted.report, "versions": versions()}
        record = {**artifact.record, "stages": [*artifact.record["stages"], stage]}
        files = {STATISTICS: fitted.statistics, ROUTERS: routers_bytes(fitted.routers)}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        record["files"] = {**artifact.record["files"], **hashes}
        replace_files(artifact.folder, {**files, RECORD: record_bytes(record)})
    wait()
    return FitResult(open_artifact(artifact.folder), replaced, fitted.report)


def _fit_recipe(
    subject: Subject,
    out: str | Path | None,
    *,
    method: str,
    data: Texts,
    settings: FitSettings,
    progress: Progress,
    **place: Any,
) -> FitResult:
    if out is None:
        raise PlanError(
            f"{subject.origin} is a recipe: expected a folder for the fitted MoE, found none",
            hint=f"run `frankenmoe fit {subject.origin} OUT`",
        )

    def maker(made: Plan, progress: Progress) -> MadeRouters:
        fitted = fit_plan(
            made,
            method=method,
            data=data,
            folder=Path.cwd(),
            settings=settings,
            together=world() > 1,
            progress=progress,
            **place,
        )
        return MadeRouters(fitted.routers, fitted.statistics)

    subject = subject.resolved(progress, device=place["device"])
    if world() > 1:  # all processes fit, then the first one writes
        refuse_occupied(Path(out).resolve())
        routers = maker(subject.plan, progress)
        if is_main():
            build(subject.with_maker(lambda *_: routers), out, virtual=True, progress=progress, stage="fit")
        wait()
        artifact = open_artifact(Path(out))
    else:
        artifact = build(subject.with_maker(maker), out, virtual=True, progress=progress, stage="fit")
    return FitResult(artifact, True, artifact.record["stages"][-1]["fit"])


def _method(recipe: Recipe, data: Texts) -> str:
    if recipe.gate_mode in FIT_MODES:
        return str(recipe.gate_mode)
    return FROM_DATA if data else default_gate_mode(recipe.experts)


def _biased(artifact: Artifact, report: Mapping[str, Any]) -> bool:
    """Whether the old routers were fitted to these held-out prompts, so that a comparison would be biased."""
    if not report["held_out_seen"] or not (artifact.folder / STATISTICS).is_file():
        return False
    return bool(load_statistics(artifact.folder / STATISTICS).facts.get("held_out_seen"))


def add_expert(
    what: Subject | Artifact | str | Path,
    out: str | Path,
    *,
    source: str,
    name: str,
    data: Sequence[str],
    settings: FitSettings | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> FitResult:
    """Writes a copy of an artifact with one more expert to `out`, and fits its routers without the other experts' text.

    The new gates are computed in closed form (by default ridge) from the stored statistics and the new expert's text,
    with the scale of the earlier fit. `device` and `dtype` are those of `fit`. Raises ArtifactError if the artifact has
    no statistics.
    """
    subject = open_subject(what)
    # the recipe's method may need the text of every expert
    own = subject.recipe.fit_settings.model_copy(update={"method": None})
    settings = settings_with(settings or own, changes)
    artifact = subject.need_artifact(hint="add the expert to the recipe, or run `frankenmoe fit` first")
    known = load_statistics(artifact.folder / STATISTICS)
    if settings.method not in (None, *CLOSED):
        raise PlanError(
            f"method {settings.method} needs the text of every expert, expected one of {', '.join(CLOSED)}",
            hint="omit --method to use ridge",
        )
    chosen = settings.method or str(known.facts["method"])
    chosen = chosen if chosen in CLOSED else "ridge"
    recipe = _with_expert(subject.plan, known.facts, source=source, name=name, data=data, method=chosen)
    old = gate_tensors(subject.routers(progress).routers)

    def maker(made: Plan, progress: Progress) -> MadeRouters:
        added = add_text(
            made,
            known,
            name=name,
            method=chosen,
            old=old,
            settings=settings,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        return MadeRouters(added.routers, added.statistics)

    larger = Subject(recipe, dtype=subject.plan.dtype_name, trust_remote_code=subject.trust_remote_code, maker=maker)
    made = build(larger, out, virtual=not subject.built, progress=progress, stage="add-expert")
    return FitResult(made, True, made.record["stages"][-1]["fit"])


def _with_expert(
    plan: Plan, facts: Mapping[str, Any], *, source: str, name: str, data: Sequence[str], method: str
) -> Recipe:
    """The recipe with one more expert. Experts without text get the data that they were fitted on."""
    recipe = plan.recipe
    if any(expert.name == name for expert in recipe.experts):
        raise RecipeError(f"there already is an expert {name!r}", hint="choose another name")
    plain = {key: value for key, value in recipe.to_dict().items() if key != "routers"}  # the file lacks the new expert
    experts = []
    for expert, written in zip(recipe.experts, plain["experts"], strict=True):
        origin = facts["text"].get(expert.name, {}).get("from", [])
        taken = {} if expert.data or expert.positive_prompts or expert.experts else {"data": list(origin)}
        experts.append({**written, "name": expert.name, **taken})
    here = Path.cwd()
    new = {
        "source_model": str(local_path(source, folder=here)) if is_folder(source, folder=here) else source,
        "name": name,
        "data": list(located({name: data})[name]),
    }
    plain["backbone"] = kept_beside(plan.choice, name).to_data()
    text = yaml.safe_dump({**plain, "gate_mode": method, "experts": [*experts, new]}, sort_keys=False)
    return Recipe.parse(text, folder=recipe.folder, origin=recipe.origin)
