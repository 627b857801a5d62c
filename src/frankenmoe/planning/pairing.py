"""Which expert of a mixture was made from which expert of a recipe, by content. Does not import torch.

Shape suffixes: E experts of the mixture and of the recipe, N sampled numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from frankenmoe.checkpoint.cast import Floats, decode
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.checkpoint.values import blocks
from frankenmoe.errors import ArtifactError
from frankenmoe.planning.plan import Plan
from frankenmoe.planning.tree import ExpertNode

SAMPLE = 2**16  # numbers of each matrix that are compared
FAR = 0.7  # relative distance; two unrelated experts of one size have 1.4
HINT = "give the recipe that it was made from, or leave --recipe out"


@dataclass(frozen=True, slots=True)
class Pair:
    """An expert of a mixture and the one of the recipe that it is nearest to.

    `distance` is the norm of their difference over that of the recipe's expert, `other` that to the nearest other one.
    """

    index: int
    expert: int
    distance: float
    other: float | None


def paired(mixture: Plan, made_from: Plan) -> tuple[Pair, ...]:
    """A pair for every expert of a mixture, in its order. Equal experts keep the recipe's order.

    Raises ArtifactError if the recipe has other sizes, or if some expert resembles none of it.
    """
    _check_sizes(mixture, made_from)
    ours = [np.concatenate(list(_samples(mixture, node))) for node in mixture.nodes]
    theirs = [np.concatenate(list(_samples(made_from, node))) for node in made_from.nodes]
    norms = [float(np.linalg.norm(each_N)) or 1.0 for each_N in theirs]
    far_EE = np.array(
        [[float(np.linalg.norm(one - two)) / norm for two, norm in zip(theirs, norms, strict=True)] for one in ours]
    )
    left_EE, found = far_EE.copy(), dict[int, int]()
    while len(found) < len(ours):
        index, expert = map(int, np.unravel_index(int(left_EE.argmin()), left_EE.shape))
        found[index] = expert
        left_EE[index, :], left_EE[:, expert] = np.inf, np.inf
    pairs = []
    for index in range(len(ours)):
        others = np.delete(far_EE[index], found[index])
        distance = float(far_EE[index, found[index]])
        pairs.append(Pair(index, found[index], distance, float(others.min()) if len(others) else None))
        if not distance < FAR:
            raise ArtifactError(
                f"expert {index} of {mixture.recipe.origin} resembles no expert of {made_from.recipe.origin} that is "
                f"left: the nearest, {made_from.nodes[found[index]].name}, is {distance:.2f} of its norm away",
                hint=HINT,
            )
    return tuple(pairs)


def _check_sizes(mixture: Plan, made_from: Plan) -> None:
    if made_from.translation is None or any(node.children for node in made_from.nodes):
        raise ArtifactError(
            f"{made_from.recipe.origin} fits no stock format, so no such folder was made from it",
            hint=HINT,
        )
    sides = [
        {
            "experts": each.experts,
            "layers": each.layers,
            "hidden size": each.hidden,
            "FFN width": each.translation.width(each.nodes[0]) if each.translation else 0,
        }
        for each in (mixture, made_from)
    ]
    differ = [f"{found} {what} against {sides[1][what]}" for what, found in sides[0].items() if found != sides[1][what]]
    if differ:
        raise ArtifactError(
            f"{mixture.recipe.origin} was not made from {made_from.recipe.origin}: {', '.join(differ)}",
            hint=HINT,
        )


def _samples(plan: Plan, node: ExpertNode) -> Iterator[Floats]:
    """The first numbers of every matrix of the first, the middle and the last layer, in the format's own order."""
    assert plan.translation is not None
    layers = plan.expert_layers
    for layer in dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])):
        row = plan.translation.ffn(node, layer)
        for suffix in sorted(row):
            write = row[suffix]
            raw = next(iter(blocks(write)))[: SAMPLE * DTYPES[write.dtype].itemsize]
            yield decode(raw, dtype=write.dtype)
