"""What differs between two audits, layer by layer; judges nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

Facts = Mapping[str, Any]

# title, where in a router's facts, and how many decimals are worth showing
MEASURES: Sequence[tuple[str, tuple[str, str], int]] = (
    ("cv", ("load", "cv"), 2),
    ("max_vio", ("load", "max_vio"), 2),
    ("entropy_share", ("load", "entropy_share"), 2),
    ("margin", ("load", "margin"), 2),
    ("information", ("domains", "information"), 2),
    ("condition", ("gate", "condition"), 1),
    ("largest_cosine", ("gate", "largest_cosine"), 2),
    ("moved", ("apart", "moved"), 2),
)

OTHER_TEXT = "The two read different text, so what differs may be the text's; --data gives both the same."


def difference(one: Facts, two: Facts) -> dict[str, Any]:
    """Per outer layer that both have, measure -> [first, second, second - first]; None where one lacks it."""
    return {
        "same_recipe": one["recipe_digest"] == two["recipe_digest"],
        "same_text": same_text(one, two),
        "layers": [
            {"layer": left["layer"]} | {name: _pair(_value(left, at), _value(right, at)) for name, at, _ in MEASURES}
            for left, right in paired(one, two)
        ],
    }


def same_text(one: Facts, two: Facts) -> bool:
    """Whether both read the same tokens under the same labels, wherever they came from."""
    left, right = (
        {name: (part["tokens"], part["digest"]) for name, part in each["text"].items()} for each in (one, two)
    )
    return left == right


def paired(one: Facts, two: Facts) -> list[tuple[Facts, Facts]]:
    """The outer routers of the layers that both audits have."""
    right = {facts["layer"]: facts for facts in two["routers"] if not facts["path"]}
    left = [facts for facts in one["routers"] if not facts["path"]]
    return [(facts, right[facts["layer"]]) for facts in left if facts["layer"] in right]


def _value(facts: Facts, at: tuple[str, str]) -> float | None:
    part = facts[at[0]]
    return None if part is None else part[at[1]]


def _pair(left: float | None, right: float | None) -> list[float | None]:
    change = None if left is None or right is None else float(f"{right - left:.5g}")
    return [left, right, change]
