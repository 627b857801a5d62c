"""The one place where tokens meet experts; does not know how the tokens were routed, nor what an expert computes."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import nn

# T tokens, D hidden, E experts, K top-k, N tokens of one expert, A = K * T assignments by choice, then by token

DROPPED = -1  # the id of an assignment that reaches no expert

DropPolicy = Literal["order", "weight"]


def dispatch(
    hidden_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    experts: Sequence[nn.Module] | nn.ModuleList,
) -> torch.Tensor:
    """out_TD: for each token, the sum of its experts' outputs times their weights, in the dtype of `hidden_TD`.

    An expert is any module from (N, D) to (N, D); it runs once, on its tokens in ascending order, or not at all if it
    has none. Ids are 0 .. E-1, or -1 for a dropped assignment, which adds nothing.
    """
    out_TD = torch.zeros_like(hidden_TD)
    for expert in torch.unique(
        ids_TK
    ).tolist():  # ascending, as the stock classes add them: the order decides the rounding
        if expert == DROPPED:
            continue
        token_N, choice_N = torch.where(ids_TK == expert)
        weighted_ND = experts[expert](hidden_TD[token_N]) * weights_TK[token_N, choice_N, None]
        out_TD.index_add_(0, token_N, weighted_ND.to(out_TD.dtype))
    return out_TD


def apply_capacity(
    weights_TK: torch.Tensor, ids_TK: torch.Tensor, *, experts: int, capacity_factor: float, policy: DropPolicy
) -> torch.Tensor:
    """ids_TK with -1 where an expert is over its capacity of ceil(capacity_factor * T * K / E) assignments.

    The capacity is that of Switch Transformer (arXiv 2101.03961, section 2.2), with K choices in place of one.
    "order" serves all first choices before all second choices, each in token order, as Switch and GShard do.
    "weight" serves the highest router weights first, so that the lowest are dropped: the batch priority of V-MoE
    (arXiv 2106.05974), by the weight of each assignment where V-MoE ranks whole tokens. Equal weights go by "order".
    """
    tokens, top_k = ids_TK.shape
    # the decimal that the user wrote: 1.1 * 200 / 4 is 55, but in binary a little more, with the ceiling 56
    capacity = math.ceil(Fraction(str(capacity_factor)) * tokens * top_k / experts)
    ids_A = ids_TK.T.reshape(-1)
    if policy == "weight":
        service_A = weights_TK.T.reshape(-1).argsort(descending=True, stable=True)
    else:
        service_A = torch.arange(len(ids_A), device=ids_A.device)
    served_A = ids_A[service_A]
    seat_A = nn.functional.one_hot(served_A, experts).cumsum(dim=0).gather(1, served_A[:, None])[:, 0]  # counted from 1
    over_A = torch.empty_like(ids_A, dtype=torch.bool)
    over_A[service_A] = seat_A > capacity
    return ids_TK.masked_fill(over_A.view(top_k, tokens).T, DROPPED)
