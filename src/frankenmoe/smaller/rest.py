"""The plan of an MoE without some of its experts. The tensors that stay are the same as before.

Does not import torch.
"""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from frankenmoe.artifact.folder import growing
from frankenmoe.checkpoint.tensors import MERGES, LowRank, Merge, Scale, TensorRef, TensorWrite
from frankenmoe.checkpoint.writer import write_shard
from frankenmoe.data.given import user_path
from frankenmoe.errors import PlanError
from frankenmoe.planning import ExpertNode, Plan, plan
from frankenmoe.planning.adopting import TAKEN, Named, Row, mixture_in, recipe_of_mixture
from frankenmoe.planning.names import expert_called, named_leaves
from frankenmoe.planning.trained import TRAINED, trained_name
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipe.backbone import BASE, METHODS, MergeSettings, backbone_of
from frankenmoe.subject import Subject

RANDOM_MERGES = ("dare_linear", "dare_ties")  # what they drop of a parent depends on its place among the others


def kept_without(plan: Plan, names: Collection[str], *, where: object) -> tuple[int, ...]:
    """The indices of the experts that stay if those in `names` go, each given by name or by number from 0.

    ArtifactError for an unknown expert, PlanError if none would stay.
    """
    known = [node.name for node in plan.nodes]
    gone = {expert_called(name, known, where=where) for name in names}
    if len(gone) == len(known):
        raise PlanError(
            f"no expert of {where} would stay, expected at least one",
            hint=f"`frankenmoe extract {where} OUT --expert {known[0]}` makes a dense model of one expert",
        )
    return tuple(index for index, name in enumerate(known) if name not in gone)


def whole_plan(subject: Subject) -> Plan:
    """The plan of an MoE. That of a built artifact without its sources reads the artifact's own tensors."""
    found = subject.plan_or_none
    if found is not None:
        return found
    recipe, origin = subject.recipe, subject.origin
    rows, shared = (
        [_row(expert, recipe.folder) for expert in experts] for experts in (recipe.experts, recipe.shared_experts)
    )
    named = Named(rows, shared[0] if shared else {}, subject.name)
    made = recipe_of_mixture(origin, mixture_in(origin), named=named)
    return plan(made, weights=True, trust_remote_code=subject.trust_remote_code)


def _row(expert: Expert, folder: Path) -> Row:
    row = {key: value for key, value in expert.model_dump(mode="json").items() if key in TAKEN and value}
    return row | ({"data": [user_path(text, folder=folder) for text in expert.data]} if expert.data else {})


def plan_without(old: Plan, kept: Sequence[int], *, inside: Path | None) -> Plan:
    """The plan of the MoE with the experts `kept` alone. `inside` is the artifact that may hold extracted adapters.

    It may compute other numbers than `old`: of a merged backbone, of noise, and of trained tensors, which are named by
    the place of their expert. `with_same_tensors` corrects that.
    """
    return _planned(old, smaller_recipe(old, kept), inside)


@contextmanager
def with_same_tensors(old: Plan, made: Plan, kept: Sequence[int], *, out: Path, inside: Path | None) -> Iterator[Plan]:
    """Within the context, the plan `made` of `plan_without` with every tensor as in `old`.

    What it would compute otherwise is written to a temporary folder beside `out`, in a file that the recipe names as
    `trained`. After a kill the same call writes the same file again, so that an unfinished build can be continued.
    ArtifactError if another process does the same now.
    """
    writes = list(_changed(old, made, kept))
    if not writes:
        yield made
        return
    content = f"{old.digest} {list(kept)}"
    with growing(out.with_name(f"{out.name}.tensors"), digest=content) as folder:
        try:
            file = folder / TRAINED
            write_shard(file, writes, metadata={"format": "pt"}, on_bytes=lambda size: None, scanned=set[TensorRef]())
            _set_time(file, content)
            yield replace(_planned(old, smaller_recipe(old, kept, trained=file), inside), carried=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _set_time(file: Path, content: str) -> None:
    """Sets the file's time to a number that stands for its content: a plan knows its files by size and time."""
    seconds = int.from_bytes(hashlib.blake2b(content.encode(), digest_size=3).digest(), "little")
    os.utime(file, (seconds, seconds))


def _planned(old: Plan, recipe: Recipe, inside: Path | None) -> Plan:
    return plan(recipe, dtype=old.dtype_name, weights=True, trust_remote_code=old.trust_remote_code, inside=inside)


def smaller_recipe(old: Plan, kept: Sequence[int], *, trained: Path | None = None) -> Recipe:
    """The recipe with the experts `kept` alone, with this file of trained tensors, and without a file of routers."""
    table = {key: value for key, value in old.recipe.to_dict().items() if key not in ("routers", "trained")}
    table["experts"] = [{**table["experts"][index], "name": old.nodes[index].name} for index in kept]
    table["experts_per_token"] = min(old.recipe.experts_per_token, len(kept))
    gone = [name for name, leaf in named_leaves(old.nodes) if leaf.path[0] not in kept]
    groups = old.choice.by_group
    idle = all(_takes_nothing(settings, gone) for settings in groups.values())
    same = {group: _less(settings, gone) for group, settings in groups.items()} if idle else {}
    table["backbone"] = backbone_of(same).to_data() if same else BASE
    if trained is not None:
        table["trained"] = str(trained)
    text = yaml.safe_dump(table, sort_keys=False)
    return Recipe.parse(text, folder=old.recipe.folder, origin=old.recipe.origin)


def _takes_nothing(settings: MergeSettings, gone: Sequence[str]) -> bool:
    """Whether a merge of backbones takes nothing from the parents of the experts that go."""
    weighted = "weights" in METHODS[settings.method] and settings.method not in RANDOM_MERGES
    return settings.method == BASE or (weighted and all(settings.weights.get(name) == 0.0 for name in gone))


def _less(settings: MergeSettings, gone: Sequence[str]) -> MergeSettings:
    left = {name: weight for name, weight in settings.weights.items() if name not in gone}
    written = {key: value for key, value in settings.to_dict().items() if key != "weights"}
    return MergeSettings.model_validate({**written, **({"weights": left} if left else {})})


def _changed(old: Plan, made: Plan, kept: Sequence[int]) -> Iterator[TensorWrite]:
    """The old tensors that the new plan would compute otherwise, under their names in a file of trained tensors."""
    for one, two in zip(old.backbone, made.backbone, strict=True):
        if not _same(one, two):
            if _adapter(two) and not _adapter(one):
                raise PlanError(
                    "the base has an adapter and its backbone is merged with those of the experts, so no expert can be "
                    "taken out of the recipe",
                    hint="build the MoE, move its sources away, and take the expert out of the built artifact",
                )
            yield _written_out(one, one.name)
    nodes = [*zip((old.nodes[index] for index in kept), made.nodes, strict=True)]
    for node, twin in (*nodes, *zip(old.shared, made.shared, strict=True)):
        for leaf, other in zip(node.leaves(), twin.leaves(), strict=True):
            yield from _changed_ffn(leaf, other)


def _changed_ffn(leaf: ExpertNode, other: ExpertNode) -> Iterator[TensorWrite]:
    for layer, row in leaf.ffn.items():
        for suffix, write in row.items():
            if write != other.ffn[layer][suffix]:
                yield _written_out(write, trained_name(other.path, write.name))


def _same(one: TensorWrite, two: TensorWrite) -> bool:
    return one == two or _without_idle(one) == _without_idle(two)


def _without_idle(write: TensorWrite) -> TensorWrite:
    """The same merge without the parents of weight zero, which add nothing."""
    merge = write.steps[0] if write.steps else None
    if not isinstance(merge, Merge) or merge.method in RANDOM_MERGES or 0.0 not in merge.weights:
        return write
    start = int(MERGES[merge.method])
    used = [at for at, weight in enumerate(merge.weights) if weight]
    inputs = (*write.inputs[:start], *(write.inputs[start + at] for at in used))
    weights = tuple(merge.weights[at] for at in used)
    return replace(write, inputs=inputs, steps=(replace(merge, weights=weights), *write.steps[1:]))


def _adapter(write: TensorWrite) -> bool:
    return any(isinstance(step, LowRank) for step in write.steps)


def _written_out(write: TensorWrite, name: str) -> TensorWrite:
    """The tensor before adapter and residual scale, which the plan applies to what is stored; then without rounding."""
    steps = tuple(step for step in write.steps if not isinstance(step, LowRank | Scale))
    return replace(write, name=name, steps=steps, dtype=write.dtype if steps == write.steps else "F32")
