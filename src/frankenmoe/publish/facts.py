"""Artifact -> what a card may say of where it came from: experts, parents, bill, licences; does not read reports.

Everything is looked up in the record and in the sources' own files; what is not there is not said.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact import Artifact
from frankenmoe.checkpoint.hub import is_hub_id
from frankenmoe.errors import ArtifactError
from frankenmoe.families import FORMATS, MoEFormat
from frankenmoe.planning import Plan
from frankenmoe.planning.compare import card_head, licence
from frankenmoe.planning.recall import plan_of
from frankenmoe.planning.sources import sources_of
from frankenmoe.publish.licences import Licences, weigh
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipestages import Card


@dataclass(frozen=True)
class Parent:
    """One source: as the recipe names it, its id on the hub if it came from there, what its own card declares."""

    name: str
    hub: tuple[str, ...]
    licence: str | None
    languages: tuple[str, ...]
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class ExpertRow:
    """One expert of the top level: what it is made of, in words, and what routes to it."""

    name: str
    made_of: str
    prompts: int
    data: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What is known of an artifact. `plan` and `parents` are None and empty where its sources are out of reach, and
    `lost` says why."""

    artifact: Artifact
    name: str
    recipe: Mapping[str, Any]
    settings: Card
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
    def trained(self) -> bool:
        """Whether the routers were learnt together with the experts."""
        return any(stage.get("stage") == "train" for stage in self.stages)


def gather(artifact: Artifact, *, settings: Card | None = None, trust_remote_code: bool = False) -> Facts:
    """Everything a card can say without a report. `settings` replaces the recipe's own `card:` section."""
    record = artifact.record
    recipe = recorded_recipe(artifact)
    wanted = settings or recipe.card or Card.model_validate({})
    plan, lost = None, None
    try:
        plan = plan_of(artifact, trust_remote_code=trust_remote_code)
    except ArtifactError as error:
        lost = error.message
    parents = tuple(dict.fromkeys(_parents(plan))) if plan else ()
    return Facts(
        artifact=artifact,
        name=recipe.name or artifact.folder.resolve().name,
        recipe=recipe.to_dict(),
        settings=wanted,
        fmt=FORMATS.get(str(record.get("format"))),
        experts=tuple(map(_row, recipe.experts)),
        shared=tuple(map(_row, recipe.shared_experts)),
        gate_mode=_gate_mode(record, recipe),
        plan=plan,
        parents=parents,
        licences=weigh([(parent.name, parent.licence) for parent in parents], declared=wanted.license),
        lost=lost,
    )


def recorded_recipe(artifact: Artifact) -> Recipe:
    """The recipe an artifact was made from, as its record keeps it."""
    return Recipe.parse(
        yaml.safe_dump(artifact.record["recipe"], sort_keys=False),
        folder=Path(artifact.record["recipe_folder"]),
        origin=str(artifact.folder / "recipe.yml"),
    )


def _gate_mode(record: Mapping[str, Any], recipe: Recipe) -> str:
    """As the first stage wrote it down: what a recipe leaves out may mean something else in another version."""
    first = next((stage["gate_mode"] for stage in record.get("stages", ()) if "gate_mode" in stage), recipe.gate_mode)
    return str(first)


def _row(expert: Expert) -> ExpertRow:
    if expert.experts:
        inner = ", ".join(child.name for child in expert.experts)
        made_of = f"a mixture of its own: {inner}"
    else:
        made_of = shown(str(expert.source_model))
    changes = {
        "adapter": f"with the adapter {shown(expert.adapter)}" if expert.adapter else None,
        "noise_relative": f"noise of {expert.noise_relative:g} of each tensor's deviation"
        if expert.noise_relative
        else None,
        "noise_scale": f"noise of deviation {expert.noise_scale:g}" if expert.noise_scale else None,
        "residual_scale": f"output times {expert.residual_scale:g}" if expert.residual_scale is not None else None,
    }
    made_of = ", ".join([made_of, *(words for words in changes.values() if words)])
    positive, negative = Recipe.prompts_of(expert)
    return ExpertRow(expert.name, made_of, len(positive) + len(negative), tuple(map(shown, expert.data)))


def shown(path: str) -> str:
    """A source as a stranger may read it: a hub id as it is, a path without the way to it from where it was named."""
    if os.path.isabs(path) or path.startswith("~"):
        return os.path.basename(path.rstrip("/"))
    return re.sub(r"^(\.{1,2}/)+", "", path)


def _parents(plan: Plan) -> Iterator[Parent]:
    named = dict.fromkeys(sources_of(plan.recipe))
    for (name, own_adapter), source in zip(named, plan.sources, strict=True):
        declared = card_head(source.folder)
        yield Parent(
            name=shown(name.path),
            hub=_hub_ids([name.path], folder=plan.recipe.folder),
            licence=licence(source.folder),
            languages=_strings(declared.get("language")),
            datasets=_strings(declared.get("datasets")),
        )
        if source.adapter is not None:
            path = own_adapter or name.adapter or str(source.adapter.folder)
            yield Parent(
                name=f"{shown(path)} (adapter)",
                hub=_hub_ids([path.split("@")[0]], folder=plan.recipe.folder),
                licence=licence(source.adapter.folder),
                languages=(),
                datasets=(),
            )


def _hub_ids(paths: Sequence[str], *, folder: Path) -> tuple[str, ...]:
    """Those paths that were fetched from the hub; a folder never was, whatever it looks like."""
    return tuple(path for path in paths if is_hub_id(path) and not os.path.isdir(folder / os.path.expanduser(path)))


def _strings(value: object) -> tuple[str, ...]:
    match value:
        case str():
            return (value,)
        case list():
            return tuple(item for item in value if isinstance(item, str))
    return ()
