"""The text in a recipe that routers are made of, and what is refused of it; does not know how they are made."""

from collections.abc import Sequence
from typing import Protocol

from frankenmoe.recipefields import refuse_blank
from frankenmoe.refusal import refusal
from frankenmoe.yamlfile import Location

Prompts = tuple[tuple[str, ...], tuple[str, ...]]
"""Positive prompts, negative prompts."""


class Texts(Protocol):
    """The keys of an expert that hold text or name it."""

    @property
    def name(self) -> str: ...
    @property
    def positive_prompts(self) -> tuple[str, ...]: ...
    @property
    def negative_prompts(self) -> tuple[str, ...]: ...
    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def experts(self) -> "tuple[Texts, ...]": ...


def prompts_of(expert: Texts) -> Prompts:
    """Positive and negative prompts; for nested experts without any of their own, those of all experts within."""
    if expert.positive_prompts or expert.negative_prompts or not expert.experts:
        return expert.positive_prompts, expert.negative_prompts
    positive, negative = zip(*map(prompts_of, expert.experts), strict=True)
    return _union(positive), _union(negative)


def _union(groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(prompt for group in groups for prompt in group))


def check_prompts(experts: Sequence[Texts], *, gate_mode: str, at: Location) -> None:
    """What mergekit's modes make gates of: prompts for every expert, not the same for all."""
    prompts = [prompts_of(expert) for expert in experts]
    for index, (positive, _) in enumerate(prompts):
        if not positive:
            raise refusal(
                f"must be given, as gate_mode {gate_mode} needs prompts for expert '{experts[index].name}', found none",
                hint="add positive_prompts, or write `gate_mode: random` and fit the routers later",
                at=(*at, index, "positive_prompts"),
            )
    _check_differ([tuple(map(sorted, each)) for each in prompts], what="prompts", at=at)


def check_text(experts: Sequence[Texts], *, gate_mode: str, at: Location) -> None:
    """What routers are fitted on: every expert has data or prompts, its own or those of the experts within."""
    for index, expert in enumerate(experts):
        if not expert.data and not prompts_of(expert)[0] and not expert.experts:
            raise refusal(
                f"must be given, as gate_mode {gate_mode} needs data or prompts for expert '{expert.name}', found none",
                hint="add data or positive_prompts, or write `gate_mode: random` and fit the routers later",
                at=(*at, index, "positive_prompts"),
            )
    own = [
        (expert.data, *map(sorted, prompts_of(expert)), *(leaf.data for leaf in expert.experts)) for expert in experts
    ]
    _check_differ(own, what="data or prompts", at=at)


def check_blank(experts: Sequence[Texts], *, at: Location) -> None:
    """A refusal for the first prompt, at any depth, that holds no text."""
    for index, expert in enumerate(experts):
        refuse_blank(expert.positive_prompts, at=(*at, index, "positive_prompts"))
        refuse_blank(expert.negative_prompts, at=(*at, index, "negative_prompts"))
        check_blank(expert.experts, at=(*at, index, "experts"))


def _check_differ(texts: Sequence[object], *, what: str, at: Location) -> None:
    if len(texts) > 1 and all(each == texts[0] for each in texts):
        raise refusal(
            f"must have {what} that differ, found the same for all, which makes all gate rows equal "
            "so that routing means nothing",
            hint=f"give each expert {what} that only it should get",
            at=at,
        )
