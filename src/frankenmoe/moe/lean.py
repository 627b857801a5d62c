"""Computes what adapter experts do between the matrices of their FFN, and stores little for backward.

Plain autograd keeps every intermediate of every (token, expert). This module keeps only the products with gate and up,
once per token. Backward computes activation, product and adapters again, one expert at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from frankenmoe.moe.adapter import LoraLinear, with_update

# D hidden, F ffn, N tokens of a group, M of one member of it


class Share(NamedTuple):
    """One expert's share of a group's work: its LoRAs, its rows among the group's tokens (ascending), its weights."""

    loras: Mapping[str, LoraLinear]
    row_M: torch.Tensor
    weight_M1: torch.Tensor

    def of(self, tensor_N: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor that has one row per token of the group."""
        return tensor_N.index_select(0, self.row_M)

    def add(self, part_M: torch.Tensor, to: torch.Tensor | None, *, like: torch.Tensor) -> torch.Tensor:
        """`to` with `part_M` added to its rows. `to` is None before the first share."""
        return (torch.zeros_like(like) if to is None else to).index_add_(0, self.row_M, part_M.to(like.dtype))


Products = Mapping[str, torch.Tensor]
"""The products with gate and up, or with up alone, by the name of the linear layer: what `act` reads comes first."""


def mix(
    hidden_ND: torch.Tensor, into_NF: Products, shares: Sequence[Share], *, act: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(mixed_NF, update_ND), two weighted sums over experts.

    `mixed_NF` sums act(gate x) * (up x), with the adapters on gate and up; act(up x) without a gate. `update_ND` sums
    what the adapters on `down` make of that; None if there are none.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _mix(hidden_ND, into_NF, shares, act=act)
    weights = (share.weight_M1 for share in shares)
    tensors = [hidden_ND, *into_NF.values(), *weights, *_learning(shares)]
    mixed_NF, update_ND = _Mix.apply(act, shares, tuple(into_NF), *tensors)  # type: ignore[no-untyped-call]
    return mixed_NF, update_ND


def _mix(
    hidden_ND: torch.Tensor, into_NF: Products, shares: Sequence[Share], *, act: nn.Module
) -> tuple[torch.Tensor, torch.Tensor | None]:
    mixed_NF, update_ND, like_NF = None, None, next(iter(into_NF.values()))
    for share in shares:
        into_MF = {name: share.of(each_NF) for name, each_NF in into_NF.items()}
        inner_MF, update_MD = _one(share.loras, share.of(hidden_ND), into_MF, share.weight_M1, act)
        mixed_NF = share.add(inner_MF, mixed_NF, like=like_NF)
        if update_MD is not None:
            update_ND = share.add(update_MD, update_ND, like=hidden_ND)
    return torch.zeros_like(like_NF) if mixed_NF is None else mixed_NF, update_ND


def _one(
    loras: Mapping[str, LoraLinear],
    hidden_MD: torch.Tensor,
    into_MF: Products,
    weight_M1: torch.Tensor,
    act: nn.Module,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One expert's weighted inner_MF, and what its adapter on `down` makes of it (or None)."""
    reuse = not torch.is_grad_enabled()  # without backward it can be overwritten; allocating memory is slow
    first_MF, *others_MF = (
        with_update(each_MF, loras.get(name), hidden_MD, in_place=reuse) for name, each_MF in into_MF.items()
    )
    inner_MF = act(first_MF)
    for factor in (*others_MF, weight_M1.to(first_MF.dtype)):
        inner_MF = inner_MF.mul_(factor) if reuse else inner_MF * factor
    return inner_MF, loras["down_proj"].update(inner_MF) if "down_proj" in loras else None


class _Mix(torch.autograd.Function):
    """`mix` with its own backward, which runs autograd for one expert at a time, on its rows only."""

    @staticmethod
    def forward(
        ctx: Any, act: nn.Module, shares: Sequence[Share], names: tuple[str, ...], *tensors: torch.Tensor
    ) -> Any:
        hidden_ND, *into_NF = tensors[: 1 + len(names)]
        ctx.act, ctx.shares, ctx.names = act, shares, names
        ctx.save_for_backward(hidden_ND, *into_NF)
        device = hidden_ND.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.set_materialize_grads(False)
        return _mix(hidden_ND, dict(zip(names, into_NF, strict=True)), shares, act=act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_made: torch.Tensor | None) -> Any:
        stored, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        device, dtype, enabled = ctx.cast
        totals: list[torch.Tensor | None] = [None] * len(stored)  # of the hidden states and the products
        weights: list[torch.Tensor | None] = []
        learnt: dict[nn.Parameter, torch.Tensor | None] = dict.fromkeys(_learning(ctx.shares))
        for share, weight_needed in zip(ctx.shares, needed[len(stored) :], strict=False):
            hidden_MD, *into_MF = (
                share.of(tensor).detach().requires_grad_(wanted) for tensor, wanted in zip(stored, needed, strict=False)
            )
            weight_M1 = share.weight_M1.detach().requires_grad_(weight_needed)
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                products = dict(zip(ctx.names, into_MF, strict=True))
                made = _one(share.loras, hidden_MD, products, weight_M1, ctx.act)
            own = _learning([share])
            found = _gradients(
                made,
                [each if each is None else share.of(each) for each in d_made],
                [hidden_MD, *into_MF, weight_M1, *own],
            )
            for index, part in enumerate(found[: len(stored)]):
                if part is not None:
                    totals[index] = share.add(part, totals[index], like=stored[index])
            weights.append(found[len(stored)])
            for parameter, part in zip(own, found[len(stored) + 1 :], strict=True):
                before = learnt[parameter]
                learnt[parameter] = part if before is None or part is None else before + part
        return None, None, None, *totals, *weights, *learnt.values()


def _gradients(
    made: Sequence[torch.Tensor | None], d_made: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The gradient of every input. None if it needs none, or if no output depends on it."""
    pairs = [
        (tensor, given.to(tensor.dtype))
        for tensor, given in zip(made, d_made, strict=True)
        if tensor is not None and given is not None and tensor.requires_grad
    ]
    wanted = [each for each in inputs if each.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in inputs]


def _learning(shares: Sequence[Share]) -> list[nn.Parameter]:
    """Every trained parameter of the adapters, once."""
    loras = [lora for share in shares for lora in share.loras.values()]
    return list(dict.fromkeys(part for lora in loras for part in (lora.a, lora.b) if part.requires_grad))
