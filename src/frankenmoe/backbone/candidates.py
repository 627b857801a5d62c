"""Backbones that can be measured: the plan of each, its running MoE, and RegMean's tensors.

RegMean's tensors are stored in a file that the recipe's key `trained` names, so every stage reads them like others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from frankenmoe.backbone.grams import backbone_linears, grams
from frankenmoe.backbone.regmean import Parent, in_turns, merged
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.gates.states import Advance, silent
from frankenmoe.gates.texts import OwnText
from frankenmoe.moe.dense import as_tensor, torch_dtype
from frankenmoe.moe.device import free_memory
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan
from frankenmoe.planning.make import plan as plan_recipe
from frankenmoe.planning.sources import Source
from frankenmoe.planning.tree import parent_tensors
from frankenmoe.recipe.backbone import MergeSettings, backbone_of

LEAST_BUDGET = 2**30  # bytes of Grams and sums


def planned(made: Plan, by_group: Mapping[str, MergeSettings], *, trained: Path | None = None) -> Plan:
    """The plan of the same recipe with an explicit backbone, and with the tensors of a file in place of some of it."""
    recipe = made.recipe.with_backbone(backbone_of(by_group), trained=trained)
    return plan_recipe(recipe, dtype=made.dtype_name, weights=True, trust_remote_code=made.trust_remote_code)


def own_texts(made: Plan, texts: Sequence[OwnText]) -> list[OwnText]:
    """The texts of experts that are no mixtures themselves, without negative ones."""
    leaves = {leaf.path for node in made.nodes for leaf in node.leaves()}
    return [text for text in texts if text.path in leaves and not text.negative]


def regmean_tensors(
    moe: MoE, made: Plan, texts: Sequence[OwnText], *, alpha: float, on_tokens: Advance = silent
) -> dict[str, torch.Tensor]:
    """Name of a linear layer's weight -> RegMean of the parents' weights, in the stored type.

    `moe` runs `made`. Every text is read with its own expert forced, so that its Grams are those of what the layers
    will read (as in RegMean++, arXiv 2508.03121, but for the layers below, which are those of `made`). Sums beyond a
    quarter of the free memory are made in turns, each with a reading of its own.
    """
    sources = {leaf.path: leaf.source for node in made.nodes for leaf in node.leaves()}
    writes = {write.name: write for write in made.backbone}
    linears = backbone_linears(moe.model, list(writes))
    shapes = {name: tuple(moe.model.get_submodule(name).weight.shape) for name in linears}
    device = moe.model.device
    found: dict[str, torch.Tensor] = {}

    def parents(group: Sequence[str]) -> Iterator[Parent]:
        for text in texts:
            blocks = (*text.kept, *text.held) if text.from_prompts else text.kept
            found = grams(moe.model, blocks, group, path=text.path, on_tokens=on_tokens)
            yield found, _weights(sources[text.path], shapes, device)

    for group in in_turns(linears, shapes, budget=max(LEAST_BUDGET, free_memory(device) // 4)):
        found |= merged(parents(group), _weights(made.base, shapes, device), alpha=alpha)
    return {
        f"{name}.weight": tensor.cpu().to(torch_dtype(writes[f"{name}.weight"].dtype)) for name, tensor in found.items()
    }


def write_trained(file: Path, tensors: Mapping[str, torch.Tensor], made: Plan) -> None:
    """Writes tensors to replace those of the sources; what the recipe's own `trained` file replaces goes before."""
    earlier = {name: tensor for file in {ref.file for ref in made.trained} for name, tensor in load_file(file).items()}
    found = {name: tensor.contiguous() for name, tensor in (dict(tensors) | earlier).items()}
    write_atomic(file, save(found, metadata={"format": "pt"}))


def _weights(
    source: Source | None, shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> Callable[[str], torch.Tensor]:
    """From a linear layer to its weight in a source, with its adapter, in float32 on `device`."""
    assert source is not None
    tensor = parent_tensors(source)

    def weight(name: str) -> torch.Tensor:
        full, shape = f"{name}.weight", shapes[name]
        return as_tensor(TensorWrite(full, "F32", shape, (tensor(full, shape),))).to(device)

    return weight
