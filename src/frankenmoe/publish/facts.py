"""The facts in a card about an artifact's origin: experts, parents, bill, licences. Reads no reports.

Everything comes from the record and from the sources' own files.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import Artifact
from frankenmoe.artifact.record import ADOPT
from frankenmoe.checkpoint.hub import is_folder, is_hub_id
from frankenmoe.errors import ArtifactError
from frankenmoe.families import FORMATS, MoEFormat
from frankenmoe.planning import Plan
from frankenmoe.planning.compare import card_head, licence
from frankenmoe.planning.sources import sources_of
from frankenmoe.publish.licences import Licences, weigh
from frankenmoe.publish.privacy import LocalNames, local_names
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipe.backbone import GROUPS
from frankenmoe.recipe.sections import CardSettings
from frankenmoe.subject import Subject


@dataclass(frozen=True)
class Parent:
    """One source: its name in the recipe, its hub id if it came from the hub, and what its own card declares."""

    name: str
    hub: str | None
    licence: str | None
    languages: tuple[str, ...]
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class ExpertRow:
    """One top-level expert: what it is made of, in words, and the prompts and data of its router."""

    name: str
    made_of: str
    prompts: int
    data: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """The known facts about an artifact. If its sources cannot be read, `plan` is None, `parents` is empty and `lost`
    is the reason."""

    artifact: Artifact
    names: LocalNames
    name: str
    recipe: Mapping[str, Any]
    base: str
    backbone: Mapping[str, str]
    settings: CardSettings
    fmt: MoEFormat | None
    experts: tuple[ExpertRow, ...]
    shared: tuple[ExpertRow, ...]
    gate_mode: str
    plan: Plan | None
    parents: tuple[Parent, ...]
    licences: Licences
    lost: str | None

    @property
    def stages(self) -> Sequence[Mapping[str, Any]]:
        """What was done to the artifact, in order, as its record says."""
        found: Sequence[Mapping[str, Any]] = self.artifact.record.get("stages", ())
        return found

    @property
    def built(self) -> bool:
        return self.artifact.form == "built"

    @property
    def adopted(self) -> Mapping[str, Any] | None:
        """What the record says of the origin of a mixture that another program made; None for one of ours."""
        return next((stage for stage in self.stages if stage.get("stage") == ADOPT), None)

    @property
    def trained(self) -> bool:
        """Whether the routers were trained together with the experts."""
        return any(stage.get("stage") == "train" for stage in self.stages)


def gather(subject: Subject, *, settings: CardSettings | None = None) -> Facts:
    """Gathers the facts. `settings` replaces the recipe's own `card:` section.

    Raises PlanError for a recipe.
    """
    artifact, recipe = subject.need_artifact(hint="build it first"), subject.recipe
    record = artifact.record
    wanted = settings or recipe.card or CardSettings()
    plan, lost = None, None
    try:
        plan = subject.plan
    except ArtifactError as error:
        lost = error.message
    names = local_names(artifact)
    parents = tuple(dict.fromkeys(_parents(plan, names))) if plan else ()
    return Facts(
        artifact=artifact,
        names=names,
        name=recipe.name or artifact.folder.resolve().name,
        recipe=recipe.to_dict(),
        base=recipe.base_model.path,
        backbone={group: str(plan.choice.by_group[group] if plan else recipe.backbone_for(group)) for group in GROUPS},
        settings=wanted,
        fmt=FORMATS.get(str(record.get("format"))),
        experts=tuple(_row(expert, names) for expert in recipe.experts),
        shared=tuple(_row(expert, names) for expert in recipe.shared_experts),
        gate_mode=_gate_mode(record, recipe),
        plan=plan,
        parents=parents,
        licences=weigh([(parent.name, parent.licence) for parent in parents], declared=wanted.license),
        lost=lost,
    )


def _gate_mode(record: Mapping[str, Any], recipe: Recipe) -> str:
    """The gate mode that the first stage recorded: the default may differ in another version."""
    first = next((stage["gate_mode"] for stage in record.get("stages", ()) if "gate_mode" in stage), recipe.gate_mode)
    return str(first)


def _row(expert: Expert, names: LocalNames) -> ExpertRow:
    if expert.experts:
        inner = ", ".join(child.name for child in expert.experts)
        made_of = f"a mixture of its own: {inner}"
    elif expert.merge is not None:
        models = [str(names.rewriter.source(name)) for name in expert.merge.models]
        made_of = f"{expert.merge.words} of {', '.join(models)}"
    else:
        assert expert.source_model is not None
        made_of = str(names.rewriter.source(expert.source_model))
    changes = {
        "adapter": f"with the adapter {names.short(expert.adapter)}" if expert.adapter else None,
        "noise_relative": f"noise of {expert.noise_relative:g} of each tensor's deviation"
        if expert.noise_relative
        else None,
        "noise_scale": f"noise of deviation {expert.noise_scale:g}" if expert.noise_scale else None,
        "residual_scale": f"output times {expert.residual_scale:g}" if expert.residual_scale is not None else None,
    }
    made_of = ", ".join([made_of, *(words for words in changes.values() if words)])
    positive, negative = Recipe.prompts_of(expert)
    return ExpertRow(expert.name, made_of, len(positive) + len(negative), tuple(map(names.short, expert.data)))


def _parents(plan: Plan, names: LocalNames) -> Iterator[Parent]:
    named = dict.fromkeys(sources_of(plan.recipe))
    for (name, own_adapter), source in zip(named, plan.sources, strict=True):
        declared = card_head(source.folder)
        yield Parent(
            name=names.short(name.path) if name.path != os.curdir else plan.recipe.name or name.path,
            hub=_hub_id(name.path, folder=plan.recipe.folder),
            licence=licence(source.folder),
            languages=_strings(declared.get("language")),
            datasets=_strings(declared.get("datasets")),
        )
        if source.adapter is not None:
            path = own_adapter or name.adapter or str(source.adapter.folder)
            yield Parent(
                name=f"{names.short(path)} (adapter)",
                hub=_hub_id(path.split("@")[0], folder=plan.recipe.folder),
                licence=licence(source.adapter.folder),
                languages=(),
                datasets=(),
            )


def _hub_id(path: str, *, folder: Path) -> str | None:
    """The path if it is a hub id; a name that is also a local folder is not one."""
    return path if is_hub_id(path) and not is_folder(path, folder=folder) else None


def _strings(value: object) -> tuple[str, ...]:
    match value:
        case str():
            return (value,)
        case list():
            return tuple(item for item in value if isinstance(item, str))
    return ()
