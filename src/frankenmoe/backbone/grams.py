"""Grams of what the backbone's linear layers read, on every expert's text.

Shape suffixes: N tokens, I inputs, B blocks of a batch, T tokens of a block.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.states import Advance, batches, padded, silent
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.linear import is_linear
from frankenmoe.planning.layout import RouterPath

Grams = dict[str, torch.Tensor]
"""Name of a linear layer -> the mean over tokens of x x^T, its inputs x, [I, I] in float32."""


def backbone_linears(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """The linear layers outside of MoE blocks whose weight is among the tensors `names`, in the order of the model.

    Not the output head: its Gram would be small, but its sum has the size of the vocabulary.
    """
    head = model.get_output_embeddings()
    inside = {id(part) for block in model.modules() if isinstance(block, MoEBlock) for part in block.modules()}
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and id(module) not in inside and f"{name}.weight" in names
    ]


@torch.no_grad()
def grams(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    linears: Sequence[str],
    *,
    path: RouterPath,
    on_tokens: Advance = silent,
) -> Grams:
    """The Gram of each linear layer over `blocks`, read with the expert at `path` forced in every layer.

    Layers that read the same tensor one after the other, such as the projections to queries, keys and values, share it.
    """
    sums = _Sums()
    with ExitStack() as hooks, forced(model, path):
        for name in linears:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(partial(sums.add, name)).remove)
        for batch in batches(blocks):
            ids_BT, sums.mask_BT = padded([block.ids for block in batch], device=model.device)
            model.get_decoder()(input_ids=ids_BT, attention_mask=sums.mask_BT.long(), use_cache=False)
            sums.last = None
            on_tokens(sum(len(block.ids) for block in batch))
    for gram_II in sums.found.values():
        gram_II.div_(sum(len(block.ids) for block in blocks))
    return {name: sums.found[first] for name, first in sums.first.items()}


@dataclass
class _Sums:
    """Sums of x x^T by linear layer. `first` maps a layer to the layer of the group whose sum is kept."""

    found: Grams = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    mask_BT: torch.Tensor = field(default_factory=lambda: torch.ones(0, 0, dtype=torch.bool))
    last: tuple[str, torch.Tensor] | None = None

    def add(self, name: str, _module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read_BTI = inputs[0]
        if self.last is not None and self.last[1] is read_BTI:
            self.first[name] = self.last[0]
            return
        self.first[name], self.last = name, (name, read_BTI)
        read_NI = read_BTI.reshape(-1, read_BTI.shape[-1])[self.mask_BT.reshape(-1)].float()
        gram_II = read_NI.T @ read_NI
        self.found[name] = gram_II if name not in self.found else self.found[name].add_(gram_II)
