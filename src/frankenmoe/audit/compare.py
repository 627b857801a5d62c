"""What differs between two audits, layer by layer."""

from typing import Any

from frankenmoe.audit.measures import Facts, Value, compared

OTHER_TEXT = "The two audits read different text, which may explain the differences. Give both the same --data."


def difference(one: Facts, two: Facts) -> dict[str, Any]:
    """Per outer layer that both have, measure -> [first, second, second - first]; None if one lacks it."""
    return {
        "same_recipe": one["recipe_digest"] == two["recipe_digest"],
        "same_text": same_text(one, two),
        "layers": [
            {"layer": left["layer"]}
            | {measure.key: _pair(measure.read(left), measure.read(right)) for measure in compared()}
            for left, right in paired(one, two)
        ],
    }


def same_text(one: Facts, two: Facts) -> bool:
    """Whether both read the same tokens under the same labels, from whatever files."""
    left, right = (
        {name: (part["tokens"], part["digest"]) for name, part in each["text"].items()} for each in (one, two)
    )
    return left == right


def paired(one: Facts, two: Facts) -> list[tuple[Facts, Facts]]:
    """The outer routers of the layers that both audits have."""
    right = {facts["layer"]: facts for facts in two["routers"] if not facts["path"]}
    left = [facts for facts in one["routers"] if not facts["path"]]
    return [(facts, right[facts["layer"]]) for facts in left if facts["layer"] in right]


def _pair(left: Value, right: Value) -> list[Value]:
    change = None
    if isinstance(left, float | int) and isinstance(right, float | int):
        change = float(f"{right - left:.5g}")
    return [left, right, change]
