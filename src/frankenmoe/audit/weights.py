"""Distances of the experts of an MoE from each other and from the base, computed on their weights in slices.

Shape suffixes: E experts (leaves, where they nest), O rows (out), I columns (in), N elements of a slice.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from frankenmoe.audit.stats import pair_distances, reference_distances
from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import as_tensor
from frankenmoe.moe.trace import blocks
from frankenmoe.planning import Plan
from frankenmoe.planning.sources import anatomy
from frankenmoe.planning.tree import DOWN, ExpertNode, ffn_writes
from frankenmoe.progress import SILENT, Progress

SLICE = 2**18  # elements of one expert at a time: 2 MB each in float64
BASE, MEAN = "base", "mean"


@dataclass(frozen=True)
class Distances:
    """Frobenius distances over all FFN matrices of one layer, relative to the norm of the reference's.

    `paths` name the experts: "2", or "2.0" for a nested one. `reference` is BASE, or the MEAN of all experts if the
    base is missing. `identical` are groups of experts with the same weights in this layer.
    """

    layer: int
    paths: tuple[str, ...]
    reference: str
    pairs_EE: torch.Tensor
    to_reference_E: torch.Tensor
    identical: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Matrix:
    """A weight of one expert with its adapter in low-rank form: `weight` + scale * b @ a. A vector is one row."""

    weight: torch.Tensor
    a_RI: torch.Tensor | None = None
    b_OR: torch.Tensor | None = None
    scale: float = 0.0

    def minus(self, reference: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` minus the reference's, in float64 on the CPU, where the reference is.

        If both are one tensor, only the adapter stays.
        """
        if reference is not None and _same_memory(self.weight, reference):
            rows_OI = torch.zeros(stop - start, self.weight.shape[1], dtype=torch.float64)
        else:
            rows_OI = self.weight[start:stop].cpu().double()
            if reference is not None:
                rows_OI = rows_OI - reference[start:stop].double()
        if self.a_RI is not None and self.b_OR is not None:
            rows_OI = rows_OI + self.scale * (self.b_OR[start:stop].cpu().double() @ self.a_RI.cpu().double())
        return rows_OI

    @property
    def anything(self) -> bool:
        """Whether it is more than zeros; the first row tells at once of most."""
        return self.a_RI is not None or bool(self.weight[0].any()) or bool(self.weight.any())

    def equals(self, other: "Matrix") -> bool:
        """Whether both have the same weights, part by part."""
        mine, theirs = (self.weight, self.a_RI, self.b_OR), (other.weight, other.a_RI, other.b_OR)
        return self.scale == other.scale and all(map(_equal, mine, theirs))


def distances(
    model: nn.Module, base: Mapping[int, Mapping[str, torch.Tensor]] | None, *, progress: Progress = SILENT
) -> Iterator[Distances]:
    """Distances layer by layer. `base` has the base's FFN tensors by layer and name; None if the base is missing.

    Sums are float64 over slices of rows, so memory does not grow with the size of an expert.
    """
    outer = [(layer, block) for layer, path, block in blocks(model) if not path]
    progress.start("comparing experts", len(outer), "layers")
    for layer, block in outer:
        yield _of_layer(layer, block, base[layer] if base else None)
        progress.advance(1)


def base_ffn(plan: Plan) -> Mapping[int, Mapping[str, torch.Tensor]]:
    """Layer -> suffix -> tensor of the base's own FFNs with its adapter folded in; memory-mapped if unchanged."""
    node = ExpertNode("base", (), plan.base, *ffn_writes(plan.base, anatomy(plan.base), dtype=plan.dtype))
    return {layer: {suffix: as_tensor(node.folded(layer, suffix)) for suffix in row} for layer, row in node.ffn.items()}


def silent_experts(model: nn.Module) -> list[str]:
    """The paths of the experts that put out zero in every layer: all that they write to the residual stream is zero."""
    found: dict[str, bool] = {}
    for _, path, block in blocks(model):
        for own, expert in leaves(block) if not path else ():
            found[own] = found.get(own, True) and not any(
                matrix.anything for name, matrix in matrices(expert).items() if name.startswith(DOWN)
            )
    return [path for path, silent in found.items() if silent]


def leaves(block: MoEBlock, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every FFN in a block, depth first."""
    for index, expert in enumerate(block.experts):
        own = f"{path}.{index}" if path else str(index)
        if isinstance(expert, MoEBlock):
            yield from leaves(expert, own)
        else:
            yield own, expert


def matrices(expert: nn.Module) -> dict[str, Matrix]:
    """Every weight and bias of an FFN as a matrix, by the name it has without an adapter."""
    found: dict[str, Matrix] = {}
    adapted = {name: part for name, part in expert.named_modules() if isinstance(part, LoraLinear)}
    for name, part in adapted.items():
        found[f"{name}.weight"] = Matrix(part.base.weight.detach(), part.a.detach(), part.b.detach(), part.scale)
        if part.base.bias is not None:
            found[f"{name}.bias"] = Matrix(_rows(part.base.bias.detach()))
    for name, parameter in expert.named_parameters(remove_duplicate=False):
        if not any(name.startswith(f"{prefix}.") for prefix in adapted):
            found[name] = Matrix(_rows(parameter.detach()))
    return found


def _of_layer(layer: int, block: MoEBlock, base: Mapping[str, torch.Tensor] | None) -> Distances:
    named = list(leaves(block))
    distinct: list[nn.Module] = list({id(expert): expert for _, expert in named}.values())
    parts = [matrices(expert) for expert in distinct]
    gram_EE = torch.zeros(len(distinct), len(distinct), dtype=torch.float64)
    norm = 0.0
    for name in parts[0]:
        reference = _rows(base[name]) if base is not None else None
        for part_EN, squared in _slices([part[name] for part in parts], reference):
            gram_EE += part_EN @ part_EN.T
            norm += squared
    place = {id(expert): index for index, expert in enumerate(distinct)}
    rows = [place[id(expert)] for _, expert in named]
    pairs_EE, to_reference_E = pair_distances(gram_EE, scale=norm**0.5), reference_distances(gram_EE, scale=norm**0.5)
    first_E = torch.tensor(_first_equal(parts, pairs_EE))
    pairs_EE[first_E[:, None] == first_E[None]] = 0.0  # equal weights: remove rounding
    return Distances(
        layer=layer,
        paths=tuple(path for path, _ in named),
        reference=MEAN if base is None else BASE,
        pairs_EE=pairs_EE[rows][:, rows],
        to_reference_E=to_reference_E[rows],
        identical=groups(first_E[rows].tolist()),
    )


def _slices(parts: Sequence[Matrix], reference: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, float]]:
    """(difference_EN, squared norm of the reference) by slices of rows. Without a reference it is the mean."""
    rows, columns = parts[0].weight.shape
    step = max(1, SLICE // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part_EN = torch.stack([part.minus(reference, start, stop).flatten() for part in parts])
        if reference is None:
            mean_N = part_EN.mean(dim=0)
            yield part_EN - mean_N, float(mean_N @ mean_N)
        else:
            flat_N = reference[start:stop].double().flatten()
            yield part_EN, float(flat_N @ flat_N)


def _first_equal(parts: Sequence[Mapping[str, Matrix]], pairs_EE: torch.Tensor) -> list[int]:
    """The index of the first part with the same weights, for each. Only pairs with a tiny distance are compared."""
    first: list[int] = []
    for index, part in enumerate(parts):
        near = (other for other in dict.fromkeys(first) if pairs_EE[other, index] < 1e-5)
        equal = (other for other in near if all(part[name].equals(parts[other][name]) for name in part))
        first.append(next(equal, index))
    return first


def groups(keys: Sequence[Hashable]) -> tuple[tuple[int, ...], ...]:
    """Indices with equal keys, in groups of two or more."""
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return tuple(tuple(group) for group in members.values() if len(group) > 1)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(1, -1)


def _same_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.dtype) == (two.data_ptr(), two.shape, two.dtype)


def _equal(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return _same_memory(one, two) or (one.shape == two.shape and bool(torch.equal(one, two)))
