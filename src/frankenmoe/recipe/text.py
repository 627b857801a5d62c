"""Checks of the prompts and data in a recipe from which routers are computed."""

from collections.abc import Sequence

from frankenmoe.recipe.expert import Expert
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
        positive = prompts_of(expert)[0]
        if not expert.data and not written(positive) and not expert.experts:
            blank = "only blank ones" if positive else "none"
            raise refusal(
                f"must be given, as gate_mode {gate_mode} needs data or prompts for expert '{expert.name}', found "
                f"{blank}",
                hint="add data or positive_prompts, or write `gate_mode: random` and fit the routers later",
                at=(*at, index, "positive_prompts"),
            )
    own = [
        (expert.data, *(sorted(written(each)) for each in prompts_of(expert)), *(leaf.data for leaf in expert.experts))
        for expert in experts
    ]
    _check_differ(own, what="data or prompts", at=at)


def written(prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts that are not blank."""
    return tuple(prompt for prompt in prompts if prompt.strip())


def _check_differ(texts: Sequence[object], *, what: str, at: Location) -> None:
    if len(texts) > 1 and all(each == texts[0] for each in texts):
        raise refusal(
            f"must have {what} that differ, found the same for all, which makes all gate rows equal "
            "so that routing means nothing",
            hint=f"give each expert {what} that only it should get",
            at=at,
        )
