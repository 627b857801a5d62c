"""Fits the routers of an artifact or a recipe, and adds experts to fitted ones; the library's and the CLI's way.

An artifact's body is never touched: routers, statistics and record are replaced together or not at all.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact import (
    RECORD,
    ROUTERS,
    STATISTICS,
    Artifact,
    finish_replacing,
    open_artifact,
    record_bytes,
    replace_files,
    routers_bytes,
)
from frankenmoe.building import MadeRouters, build, is_recipe, load_recipe, versions
from frankenmoe.errors import PlanError, RecipeError
from frankenmoe.gates.add import add_text
from frankenmoe.gates.closed import CLOSED
from frankenmoe.gates.stage import computing_dtype, fit_plan
from frankenmoe.gates.statistics import load_statistics
from frankenmoe.gates.texts import LENGTH, TOKENS
from frankenmoe.loading import load
from frankenmoe.moe.dense import as_tensor
from frankenmoe.moe.load import copy
from frankenmoe.planning import Plan
from frankenmoe.planning.recall import plan_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import FIT_MODES, Expert, Recipe
from frankenmoe.recipefields import FROM_DATA, FROM_PROMPTS

Data = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class FitResult:
    """`replaced` says whether the artifact has the new routers now; `report` is what its record keeps of the fit."""

    artifact: Artifact
    replaced: bool
    report: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"artifact": str(self.artifact.folder), "replaced": self.replaced, **self.report}


def fit(
    what: Recipe | Artifact | str | Path,
    out: str | Path | None = None,
    *,
    data: Data | None = None,
    method: str | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    keep_anyway: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> FitResult:
    """Fits every router to the experts' text: of an artifact in place, of a recipe into a virtual artifact `out`.

    `data` maps experts' names to files or datasets, which go before the recipe's; relative paths start at the working
    directory. `method` is a gate mode among FIT_MODES, by default the recipe's own, or else regret for data and
    logistic for prompts. An artifact keeps
    its old routers where the new ones do not lower the mean held-out loss, unless `keep_anyway`, or unless the old ones
    were fitted to these held-out prompts before.
    """
    options: dict[str, Any] = {
        "data": absolute(data or {}), "folder": Path.cwd(), "tokens": tokens, "length": length,
        "trust_remote_code": trust_remote_code, "progress": progress,
    }  # fmt: skip
    if isinstance(what, Recipe) or (isinstance(what, str | Path) and is_recipe(what)):
        return _fit_recipe(load_recipe(what), out, method=method, options=options)
    if out is not None:
        raise PlanError(
            f"{what} is an artifact, whose routers are replaced in place, expected no second folder, found {out}",
            hint="copy the artifact first if the old routers are still needed",
        )
    return _fit_artifact(what, method=method, keep_anyway=keep_anyway, options=options)


def absolute(data: Data) -> dict[str, tuple[str, ...]]:
    """Files by their full path, so that a record can name them from anywhere; anything else as it is."""
    return {
        name: tuple(str(Path(each).absolute()) if Path(each).expanduser().exists() else each for each in names)
        for name, names in data.items()
    }


def _method(recipe: Recipe, method: str | None, data: Data) -> str:
    if method or recipe.gate_mode in FIT_MODES:
        return method or recipe.gate_mode
    return FROM_DATA if data or _have_data(recipe.experts) else FROM_PROMPTS


def _have_data(experts: Sequence[Expert]) -> bool:
    return any(expert.data or _have_data(expert.experts) for expert in experts)


def _fit_recipe(recipe: Recipe, out: str | Path | None, *, method: str | None, options: Mapping[str, Any]) -> FitResult:
    if out is None:
        raise PlanError(
            f"{recipe.origin} is a recipe, so its fitted MoE needs a folder, found none",
            hint=f"say where: `frankenmoe fit {recipe.origin} OUT`",
        )
    chosen = _method(recipe, method, options["data"])

    def maker(made: Plan, progress: Progress) -> MadeRouters:
        fitted = fit_plan(made, method=chosen, **options)
        return MadeRouters(fitted.routers, fitted.statistics)

    artifact = build(
        recipe,
        out,
        virtual=True,
        trust_remote_code=options["trust_remote_code"],
        progress=options["progress"],
        router_maker=maker,
        stage="fit",
    )
    return FitResult(artifact, True, artifact.record["stages"][-1]["fit"])


def _fit_artifact(
    what: Artifact | str | Path, *, method: str | None, keep_anyway: bool, options: Mapping[str, Any]
) -> FitResult:
    artifact = what if isinstance(what, Artifact) else open_artifact(Path(what))
    finish_replacing(artifact.folder)
    made = plan_of(artifact, trust_remote_code=options["trust_remote_code"])
    moe = load(artifact, dtype=computing_dtype(made), trust_remote_code=options["trust_remote_code"])
    fitted = fit_plan(made, method=_method(made.recipe, method, options["data"]), moe=moe, **options)
    replaced = fitted.better or keep_anyway or _biased(artifact, fitted.report)
    if replaced:
        stage = {"stage": "fit", "fit": fitted.report, "versions": versions()}
        record = {**artifact.record, "stages": [*artifact.record["stages"], stage]}
        files = {STATISTICS: fitted.statistics, ROUTERS: routers_bytes(fitted.routers)}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        record["files"] = {**artifact.record["files"], **hashes}
        replace_files(artifact.folder, {**files, RECORD: record_bytes(record)})
    return FitResult(open_artifact(artifact.folder), replaced, fitted.report)


def _biased(artifact: Artifact, report: Mapping[str, Any]) -> bool:
    """Whether the old routers were fitted to these held-out prompts, so that comparing them would mean nothing."""
    if not report["held_out_seen"] or not (artifact.folder / STATISTICS).is_file():
        return False
    return bool(load_statistics(artifact.folder / STATISTICS).facts.get("held_out_seen"))


def add_expert(
    folder: str | Path,
    out: str | Path,
    *,
    source: str,
    name: str,
    data: Sequence[str],
    method: str | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> FitResult:
    """A new artifact `out` like the one in `folder` with one expert more, its router fitted without the others' text.

    Their kept statistics and those of the new expert's text give closed-form gates (by default ridge) of the scale
    that was found before. Raises ArtifactError where the artifact has no statistics.
    """
    artifact = open_artifact(Path(folder))
    known = load_statistics(artifact.folder / STATISTICS)
    chosen = method or str(known.facts["method"])
    chosen = chosen if chosen in CLOSED else "ridge"
    before = plan_of(artifact, trust_remote_code=trust_remote_code)
    recipe = _with_expert(before.recipe, known.facts, source=source, name=name, data=data, method=chosen)
    old = {each: as_tensor(copy(artifact.routers, each, each)) for each in artifact.routers}

    def maker(made: Plan, progress: Progress) -> MadeRouters:
        added = add_text(
            made, known, name=name, method=chosen, old=old, tokens=tokens, length=length,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
        return MadeRouters(added.routers, added.statistics)

    made = build(
        recipe,
        out,
        virtual=artifact.form == "virtual",
        trust_remote_code=trust_remote_code,
        progress=progress,
        router_maker=maker,
        stage="add-expert",
    )
    return FitResult(made, True, made.record["stages"][-1]["fit"])


def _with_expert(
    recipe: Recipe, facts: Mapping[str, Any], *, source: str, name: str, data: Sequence[str], method: str
) -> Recipe:
    """The recipe with one expert more; those without text in it get the data that they were fitted on."""
    if any(expert.name == name for expert in recipe.experts):
        raise RecipeError(f"there is an expert {name!r} already", hint="give the new one another name")
    plain = {key: value for key, value in recipe.to_dict().items() if key != "routers"}  # of the experts before
    experts = []
    for expert, written in zip(recipe.experts, plain["experts"], strict=True):
        origin = facts["text"].get(expert.name, {}).get("from", [])
        taken = {} if expert.data or expert.positive_prompts or expert.experts else {"data": list(origin)}
        experts.append({**written, "name": expert.name, **taken})
    path = Path(source).expanduser()
    new = {
        "source_model": str(path.absolute()) if path.exists() else source,
        "name": name,
        "data": list(absolute({name: data})[name]),
    }
    text = yaml.safe_dump({**plain, "gate_mode": method, "experts": [*experts, new]}, sort_keys=False)
    return Recipe.parse(text, folder=recipe.folder, origin=recipe.origin)
