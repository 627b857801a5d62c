"""Which text belongs to which expert: what the user gives, else the recipe's data, else its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from frankenmoe.data.documents import check_data
from frankenmoe.data.given import Pair
from frankenmoe.errors import RecipeError, SourceError
from frankenmoe.recipe import Recipe
from frankenmoe.suggest import did_you_mean

UNLABELLED = "text"


@dataclass(frozen=True)
class Labelled:
    """The text of one domain: files and hub datasets in `folder`, or prompts. `own` is the index of its expert."""

    names: tuple[str, ...]
    folder: Path
    prompts: tuple[str, ...]
    own: int | None

    @property
    def origin(self) -> tuple[str, ...]:
        return self.names or ("positive prompts of the recipe",)


def labelled(recipe: Recipe, data: Sequence[Pair]) -> dict[str, Labelled]:
    """Label -> text. `data` are pairs of (expert or None, file or hub dataset), with paths from the working directory.

    Raises RecipeError for an unknown expert, SourceError for a missing file and if there is no text at all.
    """
    experts = [expert.name for expert in recipe.experts]
    if data:
        found = _given(experts, data)
    else:
        found = {
            expert.name: Labelled(expert.data, recipe.folder, (), index)
            for index, expert in enumerate(recipe.experts)
            if expert.data
        }
    if not found:
        prompted = ((index, expert, Recipe.prompts_of(expert)[0]) for index, expert in enumerate(recipe.experts))
        found = {
            expert.name: Labelled((), recipe.folder, positive, index)
            for index, expert, positive in prompted
            if positive
        }
    if not found:
        raise SourceError(
            f"{recipe.origin} names neither data nor prompts for its experts, so there is no text to read",
            hint="add --data EXPERT=FILE, or --data FILE for text without a label",
        )
    for domain in found.values():
        check_data(domain.names, folder=domain.folder)
    return found


def _given(experts: Sequence[str], data: Sequence[Pair]) -> dict[str, Labelled]:
    files: dict[str, list[str]] = {}
    unlabelled = next(name for name in (UNLABELLED, f"{UNLABELLED} without a label") if name not in experts)
    for label, file in data:
        if label is not None and label not in experts:
            raise RecipeError(
                f"--data {label}={file} names an unknown expert, expected one of {', '.join(experts)}",
                hint=did_you_mean(label, experts),
            )
        files.setdefault(label or unlabelled, []).append(file)
    labels = {label for label, _ in data}
    return {
        name: Labelled(tuple(names), Path.cwd(), (), experts.index(name) if name in labels else None)
        for name, names in files.items()
    }
