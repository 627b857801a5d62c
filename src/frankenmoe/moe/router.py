"""Scores the experts for each token and chooses the top k."""

from typing import NamedTuple

import torch
from torch import nn

from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError
from frankenmoe.families.spec import SOFTMAX, RouterRule

# T tokens, D hidden, E experts, K top-k


class Routing(NamedTuple):
    """What a router decided for T tokens.

    `weights_TK` scale the outputs of the chosen experts. `ids_TK` (int64) are these experts by descending weight, with
    -1 for a dropped assignment. `logits_TE` are the raw scores, in the dtype of the gate or in float32.
    """

    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    logits_TE: torch.Tensor


class Router(nn.Module):
    """A linear gate, then scores of all experts and the top k of them, in float32. The gate (E, D) is not copied.

    `rule` says which scores (softmax over all experts, or sigmoid of each) and whether the weights are rounded to the
    dtype of the gate, as transformers does for Qwen2-MoE but not for Mixtral; that changes nothing in float32.
    `renormalize` divides the K weights by their sum (Mixtral); otherwise they stay as they are (Qwen2-MoE).
    Raises ArtifactError unless the gate is a matrix and 1 <= top_k <= E.
    """

    def __init__(self, weight_ED: torch.Tensor, *, top_k: int, renormalize: bool, rule: RouterRule = SOFTMAX) -> None:
        super().__init__()
        if weight_ED.dim() != 2:
            raise ArtifactError(
                f"a router's gate must be a matrix (experts, hidden), found shape {tuple(weight_ED.shape)}",
                hint="fit or build the routers again",
            )
        experts = weight_ED.shape[0]
        if not 1 <= top_k <= experts:
            raise ArtifactError(
                f"a router over {counted(experts, 'expert')} must choose between 1 and {experts} per token, "
                f"found top_k = {top_k}",
                hint="change experts_per_token or the number of experts",
            )
        self.weight = nn.Parameter(weight_ED)
        self.top_k = top_k
        self.renormalize = renormalize
        self.rule = rule

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Routes T tokens. NaN in `hidden_TD` or in the gate gives NaN weights, without an error."""
        return self.choose(self.logits(hidden_TD), top_k=self.top_k)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The gate's scores, logits_TE."""
        if self.rule.wide:
            return nn.functional.linear(hidden_TD.float(), self.weight.float())
        return nn.functional.linear(hidden_TD, self.weight)

    def choose(self, logits_TE: torch.Tensor, *, top_k: int) -> Routing:
        """The routing that follows from the gate's scores."""
        weights_TK, ids_TK = self.scores(logits_TE).topk(top_k, dim=-1)
        if self.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + self.rule.epsilon)
        if self.rule.rounds_weights:
            weights_TK = weights_TK.to(self.weight.dtype)
        return Routing(weights_TK, ids_TK, logits_TE)

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """What the weights are made of: a number from 0 to 1 for every expert, in float32."""
        if self.rule.score == "sigmoid":
            return logits_TE.float().sigmoid()
        return logits_TE.softmax(dim=-1, dtype=torch.float32)

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"experts={experts}, hidden={hidden}, top_k={self.top_k}, renormalize={self.renormalize}"
