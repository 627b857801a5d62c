"""Checks of the prompts and data in a recipe from which routers are computed."""

from collections.abc import Sequence

from frankenmoe.recipe.expert import Expert
from frankenmoe.recipe.fields import refuse_blank
from frankenmoe.recipe.refusals import refusal
from frankenmoe.recipe.yaml import Location

Prompts = tuple[tuple[str, ...], tuple[str, ...]]
"""(positive prompts, negative prompts)"""


def prompts_of(expert: Expert) -> Prompts:
    """Positive and negative prompts. A nested mixture without prompts of its own gets those of all its experts."""
    if expert.positive_prompts or expert.negative_prompts or not expert.experts:
        return expert.positive_prompts, expert.negative_prompts
    positive, negative = zip(*map(prompts_of, expert.experts), strict=True)
    return _union(positive), _union(negative)


def _union(groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(prompt for group in groups for prompt in group))


def check_prompts(experts: Sequence[Expert], *, gate_mode: str, at: Location) -> None:
    """Rejects experts without prompts, and prompts that are the same for all; for mergekit's gate modes."""
    prompts = [prompts_of(expert) for expert in experts]
    for index, (positive, _) in enumerate(prompts):
        if not positive:
            raise refusal(
                f"must be given, as gate_mode {gate_mode} needs prompts for expert '{experts[index].name}', found none",
                hint="add positive_prompts, or write `gate_mode: random` and fit the routers later",
                at=(*at, index, "positive_prompts"),
            )
    _check_differ([tuple(map(sorted, each)) for each in prompts], what="prompts", at=at)


def check_text(experts: Sequence[Expert], *, gate_mode: str, at: Location) -> None:
    """Rejects experts without data and prompts, and texts that are the same for all; for modes that fit routers."""
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


def check_blank(experts: Sequence[Expert], *, at: Location) -> None:
    """Rejects the first prompt without text, at any depth."""
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
