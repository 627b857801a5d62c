"""Recipe and sources -> how each group of the backbone is made, and its tensor writes. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.checkpoint.tensors import FLOATS, Merge, TensorRef, TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.planning.distance import SAME, Distance
from frankenmoe.planning.groups import group_of
from frankenmoe.planning.names import expert_data, named_leaves
from frankenmoe.planning.siblings import backbone_shapes, check_backbones
from frankenmoe.planning.sources import Anatomy, Source, anatomy
from frankenmoe.planning.tree import (
    EVERY_NAME,
    ExpertNode,
    adapter_steps,
    merged_write,
    parent_tensors,
    refuse_strange_keys,
    stored_as,
    tensor_seed,
    with_lora,
)
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.backbone import (
    AUTO,
    AVERAGE,
    BASE,
    EMBEDDINGS,
    GROUPS,
    HEAD,
    METHODS,
    REGMEAN,
    SLERP,
    WITHOUT_BASE,
    Groups,
    MergeSettings,
    spelled,
)

FAR_EMBEDDINGS = 0.2
"""The relative distance from which embeddings are too far from the base's to be averaged without measuring."""

SHOWN = 4  # names in a sentence


@dataclass(frozen=True)
class Choice:
    """How each group is made, without `auto`; `why` is the reason in words.

    With `open`, text and a running model must decide first: `auto` has candidates to try, or a group is `regmean`, for
    which `by_group` has the average, of the same size.
    """

    by_group: Mapping[str, MergeSettings]
    why: str
    open: bool = False

    @property
    def from_base(self) -> bool:
        """Whether the whole backbone is the base's."""
        return all(settings.method == BASE for settings in self.by_group.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `frankenmoe plan --json` prints it."""
        return {
            "groups": {group: settings.to_data() for group, settings in self.by_group.items()},
            "why": self.why,
            "open": self.open,
        }

    def __str__(self) -> str:
        """Such as `task_arithmetic, lambda 0.7`, or each group with its own."""
        return spelled(self.by_group)


def choose(
    recipe: Recipe,
    base: tuple[Source, Anatomy],
    nodes: tuple[ExpertNode, ...],
    distances: Sequence[Distance],
) -> Choice:
    """How the backbone is made: as the recipe says, or what `auto` means for these parents.

    Raises SourceError if parents whose tensors are merged have other tensors than the base.
    """
    found = _chosen(recipe, base, nodes, distances)
    donors = [(single, anatomy(single)) for source in distinct_parents(nodes) for single in source.singles]
    groups = [group for group, settings in found.by_group.items() if settings.method != BASE]
    check_backbones(base, donors, groups=groups)
    return found


def _chosen(
    recipe: Recipe, base: tuple[Source, Anatomy], nodes: tuple[ExpertNode, ...], distances: Sequence[Distance]
) -> Choice:
    asked = {group: recipe.backbone_for(group) for group in GROUPS}
    if asked[GROUPS[0]].method == AUTO:
        return _automatic(base, nodes, distances, has_data=bool(expert_data(recipe)))
    why = "as the recipe says" if recipe.backbone else f"mergekit's way, with its gate_mode {recipe.gate_mode}"
    average = MergeSettings(method=AVERAGE)
    by_group = {group: average if each.method == REGMEAN else each for group, each in asked.items()}
    waits = any(each.method == REGMEAN for each in asked.values())
    return Choice(by_group, "regmean is computed from text when the MoE is made" if waits else why, open=waits)


def _automatic(
    base: tuple[Source, Anatomy], nodes: tuple[ExpertNode, ...], distances: Sequence[Distance], *, has_data: bool
) -> Choice:
    sources = distinct_parents(nodes)
    files = (single for source in (base[0], *sources) for single in source.singles)
    lacking = next((single for single in files if not single.checkpoint.has_weights), None)
    if lacking is not None:
        return whole(BASE, f"auto: decided once the weights of {lacking.name} are here")
    if adapter_steps(*base):
        return whole(BASE, "auto: the base has an adapter of its own")
    odd = _odd_parent(base, sources)
    if odd is not None:
        return whole(BASE, f"auto: {odd}")
    differing = [each for each in distances if each.differs]
    if not differing:
        return whole(BASE, "auto: no parent differs from the base outside its FFNs")
    if len(sources) == 1:
        return whole(AVERAGE, "auto: all experts have one parent, so its backbone is theirs")
    if has_data:
        by_group = dict.fromkeys(GROUPS, MergeSettings(method=AVERAGE))
        return Choice(by_group, "auto: measured on the experts' data when the MoE is made", open=True)
    return _without_data(distances)


def _without_data(distances: Sequence[Distance]) -> Choice:
    """The rule for parents whose backbone cannot be measured.

    The mean was never far from the best, of two or four parents, near the base or far from it; lambda 0.7 was worse
    than the base for four. Embeddings that moved far are each right for their own parent only (docs/backbones.md).
    """
    average, base = MergeSettings(method=AVERAGE), MergeSettings(method=BASE)
    why = "auto: the parents differ outside their FFNs, and there is no data"
    if not far_embeddings(distances):
        return Choice(dict.fromkeys(GROUPS, average), why)
    by_group = {group: base if group in (EMBEDDINGS, HEAD) else average for group in GROUPS}
    return Choice(by_group, f"{why}; their embeddings moved too far to be averaged")


def far_embeddings(distances: Sequence[Distance]) -> bool:
    """Whether some parent's embeddings or head moved far from the base's, or unknown far."""
    found = [each.groups.get(group, 0.0) for each in distances for group in (EMBEDDINGS, HEAD)]
    return any(each is None or each >= FAR_EMBEDDINGS for each in found)


def whole(method: str, why: str) -> Choice:
    """A choice of one method without settings for all groups."""
    return Choice(dict.fromkeys(GROUPS, MergeSettings(method=method)), why)


def kept_beside(choice: Choice, expert: str) -> MergeSettings | Groups:
    """The same backbone in a recipe with one more expert, which gets the weight 0. PlanError for slerp.

    Routers that were fitted before stay right only if the states that they read stay the same.
    """
    groups = {}
    for group, settings in choice.by_group.items():
        if settings.method == SLERP:
            raise PlanError(
                "slerp has exactly two parents, so no expert can be added to this backbone",
                hint="make a new recipe with backbone: average or task_arithmetic",
            )
        weighted = "weights" in METHODS[settings.method]
        weights = {"weights": {**settings.weights, expert: 0.0}} if weighted else {}
        groups[group] = MergeSettings.model_validate(settings.to_dict() | weights)
    first = groups[GROUPS[0]]
    return first if all(each == first for each in groups.values()) else Groups.model_validate(groups)


def lost_differences(choice: Choice, distances: Sequence[Distance]) -> list[str]:
    """A warning if parents differ from the base in groups that the base alone gives."""
    taken = [group for group in GROUPS if choice.by_group[group].method == BASE]
    lost = {
        (each.expert, group): far
        for each in distances
        for group in taken
        if (far := each.groups.get(group, 0.0)) is None or far > SAME
    }
    if not lost:
        return []
    names = list(dict.fromkeys(expert for expert, _ in lost))
    most = max((far for far in lost.values() if far is not None), default=None)
    size = "" if most is None else f" by up to {most:.2%} of a group's norm"
    where = [group for group in taken if any(other == group for _, other in lost)]
    one = len(names) == 1
    whose = "its" if one else "their"
    what = f"outside {whose} FFNs" if len(taken) == len(GROUPS) else f"in {' and '.join(where)}"
    return [
        f"{_listed(names)} {'differs' if one else 'differ'} from the base {what}{size}, and the base's backbone loses "
        "that; `backbone: auto` chooses a merge that keeps most of it"
    ]


def _listed(names: Sequence[str]) -> str:
    if len(names) > SHOWN:
        return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _odd_parent(base: tuple[Source, Anatomy], sources: Sequence[Source]) -> str | None:
    """Why some parent's backbone cannot be merged with the base's, if so."""
    ours = backbone_shapes(base[1], GROUPS)
    for single in (single for source in sources for single in source.singles):
        theirs = backbone_shapes(anatomy(single), GROUPS)
        odd = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if odd is not None:
            return f"{odd} of {single.name} has another shape than the base's"
    return None


def distinct_parents(nodes: tuple[ExpertNode, ...]) -> list[Source]:
    """The parents of the routed experts, each once."""
    found = {leaf.source.key: leaf.source for _, leaf in named_leaves(nodes) if leaf.source is not None}
    return list(found.values())


def backbone_writes(
    recipe: Recipe,
    base: Source,
    parts: Anatomy,
    *,
    nodes: tuple[ExpertNode, ...],
    by_group: Mapping[str, MergeSettings],
    dtype: str,
) -> tuple[TensorWrite, ...]:
    """The backbone under its dense names: the base's tensors, or merges of those of the experts' parents.

    Every routed expert counts once, as in Branch-Train-MiX (arXiv 2403.07816, section 2.2), also if several have one
    parent. Parents count with their adapters and merges. Raises PlanError if an adapter on the base would be lost.
    """
    loras = adapter_steps(base, parts)
    refuse_strange_keys(base, EVERY_NAME)
    donors = [(name, leaf.source) for name, leaf in named_leaves(nodes) if leaf.source is not None]
    merged = any(settings.method != BASE for settings in by_group.values())
    read = [parent_tensors(source) for _, source in donors] if merged else []
    of_base = parent_tensors(base)
    writes = []
    for name, shape in parts.backbone.items():
        settings, ref = by_group[group_of(name)], base.tensor(name, shape)
        if settings.method == BASE or ref.dtype not in FLOATS:
            write = TensorWrite(name, stored_as(ref, dtype), shape, (ref,))
            writes.append(with_lora(write, loras[name]) if name in loras else write)
            continue
        if name in loras and settings.method in WITHOUT_BASE:
            raise PlanError(
                f"backbone: {settings.method} takes nothing from the base, so the adapter on base_model {base.name} "
                "would be lost",
                hint="drop the adapter from base_model, or use backbone: base or task_arithmetic",
            )
        inputs: list[TensorRef | TensorWrite] = [] if settings.method in WITHOUT_BASE else [of_base(name, shape)]
        weights = tuple(settings.weights.get(expert, 1.0) for expert, _ in donors)
        merge = Merge(
            settings.method, weights, settings.scale, settings.density, settings.t, tensor_seed(recipe.seed, (), name)
        )
        inputs += [tensor(name, shape) for tensor in read]
        writes.append(merged_write(name, dtype, shape, tuple(inputs), merge))
    return tuple(writes)
