"""Computes packed experts on a GPU. The host never waits for the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from frankenmoe.moe.gpu.packing import Adapted, Distinct, LowRank, Packed, stacked

# T tokens, D hidden, F ffn, E experts, K top-k, R rank, I inputs, O outputs
# A = T * K assignments: by token, then by choice, or sorted by expert

# Up to this many assignments, each gets a copy of its expert's weights and its own product. Above, assignments are
# sorted and each expert's weights are read once. The break-even point on a GPU has not been measured.
FEW = 8


class Rows(NamedTuple):
    """The assignments in the order of computation: former position, token and row of the expert's weights.

    `back_A` restores the former order. `end_E` is where each expert's rows end. Both are None for at most FEW
    assignments, which are not sorted.
    """

    order_A: torch.Tensor
    token_A: torch.Tensor
    place_A: torch.Tensor
    back_A: torch.Tensor | None
    end_E: torch.Tensor | None


def takes(packed: Packed, hidden_TD: torch.Tensor, ids_TK: torch.Tensor) -> bool:
    """Whether `mix` can compute this without waiting for the device. If not, the experts run one after another.

    torch's grouped product does not wait in bfloat16 on a GPU of compute capability 9 or 10. In other dtypes or on
    other GPUs it reads the offsets back. Its rows must be a multiple of 16 bytes. Up to FEW assignments do without.
    Under autocast to the dtype of the weights, as in training, tokens may be float32: autocast would round them too.
    """
    like = packed.like
    casts = torch.is_autocast_enabled(like.device.type)
    if casts and torch.get_autocast_dtype(like.device.type) != like.dtype:
        return False
    dtypes = (like.dtype, torch.float32) if casts else (like.dtype,)
    if hidden_TD.device != like.device or hidden_TD.dtype not in dtypes:
        return False
    return ids_TK.numel() <= FEW or (packed.aligned and _has_grouped_product(like.device, like.dtype))


def mix(hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, packed: Packed) -> torch.Tensor:
    """out_TD: for each token, the weighted sum of its experts' outputs, in the dtype of `hidden_TD`.

    All shapes depend only on the shapes of the arguments. Ids are 0 .. E-1, or -1 for a dropped assignment, which is
    computed as if it went to expert 0 and is then masked. Each token's sum is one reduction, in float32 within torch.
    """
    like = packed.like
    with torch.autocast(like.device.type, enabled=False):  # the next line casts instead
        hidden = hidden_TD.to(like.dtype)
        if isinstance(packed, Distinct):
            return _distinct(hidden, weights_TK, ids_TK, packed).to(hidden_TD.dtype)
        return _adapted(hidden, weights_TK, ids_TK, packed).to(hidden_TD.dtype)


def _distinct(
    hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, packed: Distinct
) -> torch.Tensor:
    place_TK = ids_TK.clamp(min=0)
    if packed.place_E is not None:
        place_TK = packed.place_E[place_TK]
    rows = _rows(place_TK, experts=packed.down_EOI.shape[0])
    into_AO = _product(hidden_TD.index_select(0, rows.token_A), packed.into_EOI, rows)
    out_AD = _product(
        _inner(into_AO.chunk(packed.into_EOI.shape[1] // packed.down_EOI.shape[2], dim=-1), packed.act),
        packed.down_EOI,
        rows,
    )
    return (_kept(out_AD, rows, ids_TK) * weights_TK[..., None]).sum(dim=1)


def _adapted(hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, packed: Adapted) -> torch.Tensor:
    """The base's gate and up once per token, down once for the weighted sum over experts (see moe/experts.py)."""
    base, low_rank = packed.group.base, stacked(packed)
    assert base is not None
    rows = _rows(ids_TK.clamp(min=0), experts=len(packed.group.members))
    hidden_AD = hidden_TD.index_select(0, rows.token_A)
    into_AF = []
    for name, linear in base.into.items():
        product_AF = linear(hidden_TD).index_select(0, rows.token_A)
        into_AF.append(product_AF + _update(hidden_AD, low_rank[name], rows) if name in low_rank else product_AF)
    weight_A = weights_TK.reshape(-1).index_select(0, rows.order_A).to(into_AF[0].dtype)
    inner_AF = _inner(into_AF, base.act) * weight_A[:, None]
    out_TD: torch.Tensor = base.down(_kept(inner_AF, rows, ids_TK).sum(dim=1))
    if "down_proj" in low_rank:
        out_TD = out_TD + _kept(_update(inner_AF, low_rank["down_proj"], rows), rows, ids_TK).sum(dim=1)
    return out_TD


def _inner(into_AF: Sequence[torch.Tensor], act: nn.Module) -> torch.Tensor:
    """act(gate x) * up x, or act(up x) without a gate: what `down` reads, [A, F]."""
    inner_AF: torch.Tensor = act(into_AF[0])
    for factor_AF in into_AF[1:]:
        inner_AF = inner_AF * factor_AF
    return inner_AF


def _rows(place_TK: torch.Tensor, *, experts: int) -> Rows:
    place_A, top_k = place_TK.reshape(-1), place_TK.shape[1]
    line_A = torch.arange(len(place_A), device=place_A.device)
    if len(place_A) <= FEW:
        return Rows(line_A, line_A // top_k, place_A, None, None)
    place_A, order_A = place_A.sort(stable=True)
    back_A = torch.empty_like(order_A).scatter_(0, order_A, line_A)
    # not bincount, which reads the maximum from the device
    places_E = torch.arange(experts, device=place_A.device)
    end_E = torch.searchsorted(place_A, places_E, right=True, out_int32=True)
    return Rows(order_A, order_A // top_k, place_A, back_A, end_E)


def _product(x_AI: torch.Tensor, weight_EOI: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[A, O]: each row times the weight of its expert."""
    if rows.end_E is None:
        return torch.bmm(weight_EOI.index_select(0, rows.place_A), x_AI[:, :, None])[:, :, 0]
    out_AO: torch.Tensor = nn.functional.grouped_mm(x_AI, weight_EOI.transpose(1, 2), offs=rows.end_E)
    return out_AO


def _update(x_AI: torch.Tensor, lora: LowRank, rows: Rows) -> torch.Tensor:
    low_AR = _product(x_AI, _reached(lora.a_ERI, rows), rows) * lora.scale_E.index_select(0, rows.place_A)[:, None]
    return _product(low_AR.to(x_AI.dtype), _reached(lora.b_EOR, rows), rows)


def _reached(weight_EOI: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Trained weights, with zero gradients for experts without rows.

    On Blackwell a grouped product leaves these gradients uninitialised (pytorch issue 172439).
    """
    if rows.end_E is None or not weight_EOI.requires_grad:
        return weight_EOI
    rows_E = rows.end_E.diff(prepend=rows.end_E.new_zeros(1))
    return torch.where((rows_E > 0)[:, None, None], weight_EOI, 0)


def _kept(out_AO: torch.Tensor, rows: Rows, ids_TK: torch.Tensor) -> torch.Tensor:
    """out_TKO: the rows in their former order, with zeros for dropped assignments.

    The caller sums over K. Adding the rows in place would use a random order on a GPU.
    """
    if rows.back_A is not None:
        out_AO = out_AO.index_select(0, rows.back_A)
    return out_AO.view(*ids_TK.shape, out_AO.shape[1]).masked_fill((ids_TK < 0)[..., None], 0)


def _has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    if not hasattr(nn.functional, "grouped_mm"):  # before torch 2.10
        return False
    if device.type == "cpu":
        return True
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
