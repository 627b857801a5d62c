"""A router that chooses among some of a block's experts, to measure a smaller MoE before it is written.

Shape suffixes: T tokens, E all experts, R the experts that stay, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from frankenmoe.artifact.folder import Routers
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.load import MoE, gate_tensors
from frankenmoe.moe.router import Router, Routing
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning import Plan


class Among(nn.Module):
    """Takes the place of a router. The experts `kept` are chosen among by `router`, which numbers them from 0."""

    def __init__(self, router: Router, kept: Sequence[int], *, experts: int) -> None:
        super().__init__()
        self.router = router
        self.kept = tuple(kept)
        self.experts = experts

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """The router's choice by the numbers of the block; the logits of all other experts are minus infinity."""
        weights_TK, ids_TK, logits_TR = self.router(hidden_TD)
        kept_R = torch.tensor(self.kept, device=ids_TK.device)
        logits_TE = logits_TR.new_full((len(logits_TR), self.experts), -torch.inf).index_copy_(1, kept_R, logits_TR)
        return Routing(weights_TK, kept_R[ids_TK], logits_TE)


def routers_among(
    moe: MoE, made: Plan, routers: Routers, kept_L: Sequence[Sequence[int]]
) -> list[tuple[MoEBlock, nn.Module]]:
    """Every outer block of an MoE with the router that makes it compute the plan `made`.

    That has the experts kept_L[layer] of the MoE, and these `routers`.
    """
    gates, found = gate_tensors(routers), list[tuple[MoEBlock, nn.Module]]()
    names = made.router_names(()).values()
    top_k = made.recipe.experts_per_token
    for name, kept, block in zip(names, kept_L, outer_blocks(moe.model).values(), strict=True):
        weight_RD = gates[name].to(device=block.router.weight.device, dtype=block.router.weight.dtype)
        router = Router(weight_RD, top_k=top_k, renormalize=made.rule.renormalizes(top_k), rule=made.rule)
        found.append((block, Among(router, kept, experts=len(block.experts))))
    return found
