"""RegMean: merges linear layers so that their outputs stay close to each parent's, on that parent's own text.

Jin et al., arXiv 2212.09849. For parents W_i [O, I] with inputs X_i [I, N], the minimiser of sum_i |W X_i - W_i X_i|^2
is W = (sum_i W_i G_i) (sum_i G_i)^-1, with the Grams G_i = X_i X_i^T.
Shape suffixes: N tokens, I inputs, O outputs of a linear layer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from frankenmoe.moe.device import in_float64

Parent = tuple[Mapping[str, torch.Tensor], Callable[[str], torch.Tensor]]
"""(Grams of a parent's text by linear layer, a function from a linear layer to the parent's weight)"""
RIDGE = 1e-6  # of a Gram's mean diagonal


@dataclass
class Sums:
    """The two sums of one linear layer over its parents: their Grams, and their differences times their Grams.

    Differences from the base, not weights, are summed: they are small, so float32 keeps their digits.
    """

    alpha: float
    gram_II: torch.Tensor | None = field(default=None, init=False)
    moved_OI: torch.Tensor | None = field(default=None, init=False)

    def add(self, gram_II: torch.Tensor, difference_OI: torch.Tensor) -> None:
        """Adds a parent: the mean Gram of its inputs, and its weight minus the base's."""
        shrunk_II = shrunk(gram_II, alpha=self.alpha)
        moved_OI = difference_OI @ shrunk_II
        self.gram_II = shrunk_II if self.gram_II is None else self.gram_II.add_(shrunk_II)
        self.moved_OI = moved_OI if self.moved_OI is None else self.moved_OI.add_(moved_OI)

    def difference(self) -> torch.Tensor:
        """The merged weight minus the base's [O, I], in float32. Solved in float64."""
        assert self.gram_II is not None
        assert self.moved_OI is not None
        factor_II = torch.linalg.cholesky(in_float64(self.gram_II))
        solved_OI = torch.cholesky_solve(in_float64(self.moved_OI).T, factor_II).T.float()
        return solved_OI.to(self.gram_II.device)


def shrunk(gram_II: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """The Gram with its off-diagonal multiplied by `alpha` (section 4.2 of the paper), and a small ridge.

    With alpha < 1 it has full rank even if the text has fewer tokens than the layer has inputs. The ridge does the same
    for inputs that are always zero and for alpha = 1; along these the result is a mean of the parents, weighted by the
    size of their inputs.
    """
    diagonal_I = gram_II.diagonal()
    ridge = RIDGE * diagonal_I.mean().clamp_min(torch.finfo(gram_II.dtype).tiny)
    return gram_II * alpha + torch.diag(diagonal_I * (1 - alpha) + ridge)


def in_turns(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], *, budget: int) -> list[list[str]]:
    """The linear layers in groups whose Grams and sums take at most `budget` bytes; a group has at least one layer."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        outputs, inputs = shapes[name]
        need = 4 * inputs * (2 * inputs + outputs)
        if not groups or need > room:
            groups.append([])
            room = budget
        groups[-1].append(name)
        room -= need
    return groups


def merged(parents: Iterable[Parent], base: Callable[[str], torch.Tensor], *, alpha: float) -> dict[str, torch.Tensor]:
    """The merged weight of each linear layer, in float32.

    `parents` gives one parent at a time. `base` is a function from a layer to the base's weight.
    """
    sums: dict[str, Sums] = {}
    for grams, weight in parents:
        for name, gram_II in grams.items():
            sums.setdefault(name, Sums(alpha)).add(gram_II, weight(name) - base(name))
    return {name: base(name) + found.difference() for name, found in sums.items()}
