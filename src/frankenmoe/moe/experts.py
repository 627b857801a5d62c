"""Sends every token through its experts and sums their outputs. Drops assignments over capacity."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import nn

from frankenmoe.moe.cpu.onetoken import OneToken
from frankenmoe.moe.gpu import grouped
from frankenmoe.moe.gpu.packing import Packed
from frankenmoe.moe.grouping import Group, Plain, group_experts
from frankenmoe.moe.lean import Share, mix

# T tokens, D hidden, F ffn, E experts, K top-k, N tokens of one expert or group, M of one member of a group
# A = K * T assignments by choice, then by token

DROPPED = -1  # the id of a dropped assignment

DropPolicy = Literal["order", "weight"]


def dispatch(
    hidden_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    experts: Sequence[nn.Module] | nn.ModuleList,
    *,
    groups: Sequence[Group] | None = None,
    packed: Packed | None = None,
    one_token: OneToken | None = None,
) -> torch.Tensor:
    """out_TD: for each token, the weighted sum of its experts' outputs, in the dtype of `hidden_TD`.

    An expert is any module from (N, D) to (N, D). It runs once, on its tokens in ascending order, or not at all if it
    has none. Ids are 0 .. E-1, or -1 for a dropped assignment, which adds nothing. `groups` is the result of
    `group_experts`: work that experts share is done once per token. `packed` holds the same experts for a GPU, and is
    used where the host need not wait for the device. `one_token` holds what a CPU kernel needs for a single token.
    """
    if packed is not None and grouped.takes(packed, hidden_TD, ids_TK):
        return grouped.mix(hidden_TD, weights_TK, ids_TK, packed)
    groups = group_experts(experts) if groups is None else groups
    if len(ids_TK) == 1 and one_token is not None:
        mixed_1D = one_token.mix(hidden_TD, weights_TK, ids_TK, groups)
        if mixed_1D is not None:
            return mixed_1D
    if len(groups) == 1:
        return _output(groups[0], hidden_TD, weights_TK, ids_TK, ids_TK != DROPPED).to(hidden_TD.dtype)
    out_TD = torch.zeros_like(hidden_TD)
    chosen = set(ids_TK.flatten().tolist() if len(ids_TK) == 1 else torch.unique(ids_TK).tolist())
    for group in groups:  # ascending like the stock classes, since the order affects rounding
        if chosen.isdisjoint(group.members):
            continue
        mine_TK = _among(ids_TK, group.members)
        if len(ids_TK) == 1:  # decoding: the token is known
            out_TD += _output(group, hidden_TD, weights_TK, ids_TK, mine_TK).to(out_TD.dtype)
            continue
        token_N = mine_TK.any(dim=1).nonzero()[:, 0]
        # index_select is three to ten times as fast as [token_N] on a CPU
        inputs = (tensor.index_select(0, token_N) for tensor in (hidden_TD, weights_TK, ids_TK, mine_TK))
        out_ND = _output(group, *inputs).to(out_TD.dtype)
        # like index_add_, which would also keep out_ND for backward
        out_TD.scatter_add_(0, token_N[:, None].expand_as(out_ND), out_ND)
    return out_TD


def _output(
    group: Group, hidden_ND: torch.Tensor, weights_NK: torch.Tensor, ids_NK: torch.Tensor, mine_NK: torch.Tensor
) -> torch.Tensor:
    """What a group adds to each of its tokens, [N, D]. `mine_NK` marks the ids that are its members."""
    if group.base is not None:
        return _adapted(group.base, hidden_ND, list(_shares(group, weights_NK, ids_NK)))
    # all members are one module, which runs once per token with the sum of their weights
    out_ND: torch.Tensor = group.module(hidden_ND)
    return out_ND * weights_NK.masked_fill(~mine_NK, 0).sum(dim=1, keepdim=True)


def _adapted(base: Plain, hidden_ND: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
    """Adapters over one FFN: gate and up once per token, low-rank terms once per (token, expert).

    down is linear, so the weighted sum over experts is taken before it: sum_k w_k (W + B_k A_k) h_k =
    W sum_k w_k h_k + sum_k B_k A_k (w_k h_k).
    """
    into_NF = {name: linear(hidden_ND) for name, linear in base.into.items()}
    mixed_NF, update_ND = mix(hidden_ND, into_NF, shares, act=base.act)
    out_ND: torch.Tensor = base.down(mixed_NF)
    return out_ND if update_ND is None else out_ND + update_ND


def _shares(group: Group, weights_NK: torch.Tensor, ids_NK: torch.Tensor) -> Iterator[Share]:
    """Yields one Share per member that has tokens."""
    lora_of = dict(zip(group.members, group.loras, strict=True))
    if len(ids_NK) == 1:  # decoding: the row is known
        row_1 = torch.zeros(1, dtype=torch.long, device=ids_NK.device)
        for choice, member in enumerate(ids_NK[0].tolist()):
            if member in lora_of:
                yield Share(lora_of[member], row_1, weights_NK[:, choice, None])
        return
    for member, loras in lora_of.items():
        row_M, choice_M = torch.where(ids_NK == member)
        if len(row_M):
            yield Share(loras, row_M, weights_NK[row_M, choice_M, None])


def _among(ids_TK: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
    """A boolean tensor [T, K]: whether an id is one of `members`."""
    if len(members) == 1:
        return ids_TK == members[0]
    return torch.isin(ids_TK, torch.tensor(members, device=ids_TK.device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ratio(factor: float) -> tuple[int, int]:
    """The decimal that the user wrote. 1.1 * 200 / 4 is 55; in binary it is slightly more, so its ceiling is 56."""
    return Fraction(str(factor)).as_integer_ratio()


def apply_capacity(
    weights_TK: torch.Tensor, ids_TK: torch.Tensor, *, experts: int, capacity_factor: float, policy: DropPolicy
) -> torch.Tensor:
    """ids_TK with -1 where an expert is over its capacity of ceil(capacity_factor * T * K / E) assignments.

    The capacity is that of Switch Transformer (arXiv 2101.03961, section 2.2), with K choices instead of one.
    "order" serves all first choices before all second choices, each in token order, as Switch and GShard do.
    "weight" serves the highest router weights first, so the lowest are dropped. This is the batch priority of V-MoE
    (arXiv 2106.05974), but it ranks assignments, not whole tokens. Equal weights are served by "order".
    """
    tokens, top_k = ids_TK.shape
    numerator, denominator = _ratio(capacity_factor)
    capacity = -(-numerator * tokens * top_k // (denominator * experts))
    ids_A = ids_TK.T.reshape(-1)
    if policy == "weight":
        service_A = weights_TK.T.reshape(-1).argsort(descending=True, stable=True)
    else:
        service_A = torch.arange(len(ids_A), device=ids_A.device)
    served_A = ids_A[service_A]
    # not one_hot, which on a CPU reads the largest id
    served_AE = served_A[:, None] == torch.arange(experts, device=served_A.device)
    seat_A = served_AE.cumsum(dim=0).gather(1, served_A[:, None])[:, 0]  # counted from 1
    over_A = torch.empty_like(ids_A, dtype=torch.bool)
    over_A[service_A] = seat_A > capacity
    return ids_TK.masked_fill(over_A.view(top_k, tokens).T, DROPPED)
