"""Walks over experts at every depth, in a recipe or in a plan. Does not import torch."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from frankenmoe.errors import ArtifactError
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.suggest import did_you_mean

Node = TypeVar("Node", Expert, ExpertNode)


def named_experts(
    experts: Sequence[Node], *, path: tuple[int, ...] = (), prefix: str = ""
) -> Iterator[tuple[str, tuple[int, ...], Node]]:
    """(name, path, expert) of every expert, groups before their members; a nested one is named "group/leaf"."""
    for index, expert in enumerate(experts):
        name, place = f"{prefix}{expert.name}", (*path, index)
        yield name, place, expert
        inner: Any = expert.experts if isinstance(expert, Expert) else expert.children
        yield from named_experts(inner, path=place, prefix=f"{name}/")


def expert_data(recipe: Recipe) -> list[str]:
    """The `data` of every expert at every depth, shared ones included."""
    experts = (*recipe.experts, *recipe.shared_experts)
    return [text for _, _, expert in named_experts(experts) for text in expert.data]


def named_leaves(nodes: Sequence[ExpertNode]) -> Iterator[tuple[str, ExpertNode]]:
    """(name, expert) of every expert that is not a mixture itself; a nested one is named "group/leaf"."""
    return ((name, node) for name, _, node in named_experts(nodes) if not node.children)


def expert_called(expert: str, names: Sequence[str], *, where: object) -> str:
    """The one of `names` that a user means by its name or its number from 0. ArtifactError if there is none."""
    if expert in names:
        return expert
    numbered = {str(index): name for index, name in enumerate(names)}
    if expert in numbered:
        return numbered[expert]
    raise ArtifactError(f"{where} has no expert {expert!r}", hint=did_you_mean(expert, names))
