"""The module that replaces the `mlp` of a decoder layer: router, experts and an optional shared expert."""

import math
from collections.abc import Iterable
from typing import Any, Self, get_args

import torch
from torch import nn

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.cpu.onetoken import OneToken
from frankenmoe.moe.experts import DropPolicy, apply_capacity, dispatch
from frankenmoe.moe.gpu.packing import Packing
from frankenmoe.moe.grouping import Group, Grouping
from frankenmoe.moe.router import Router, Routing

# T tokens, D hidden, E experts, K top-k


class Capacity(nn.Module):
    """Drops assignments over an expert's capacity. It is a module so that hooks can read the final routing.

    `factor` is None for no limit. Raises ArtifactError unless the factor is positive and finite and the policy known.
    """

    def __init__(self, factor: float | None, *, policy: DropPolicy) -> None:
        super().__init__()
        if factor is not None and not 0 < factor < math.inf:
            raise ArtifactError(
                f"a block's capacity_factor must be a positive number, found {factor}",
                hint="1.25 is common; leave it out for no limit",
            )
        if policy not in get_args(DropPolicy):
            raise ArtifactError(
                f"a block's drop_policy must be one of {', '.join(get_args(DropPolicy))}, found {policy!r}",
                hint="'order' drops the last tokens, 'weight' the lowest router weights",
            )
        self.factor = factor
        self.policy: DropPolicy = policy

    def forward(self, routing: Routing) -> Routing:
        """The same routing, with the id -1 for dropped assignments. Weights are not renormalised."""
        if self.factor is None:
            return routing
        ids_TK = apply_capacity(
            routing.weights_TK,
            routing.ids_TK,
            experts=routing.logits_TE.shape[1],
            capacity_factor=self.factor,
            policy=self.policy,
        )
        return routing._replace(ids_TK=ids_TK)

    def extra_repr(self) -> str:
        return "unlimited" if self.factor is None else f"factor={self.factor}, policy={self.policy}"


class MoEBlock(nn.Module):
    """sum_k weight_k * expert_k(x), plus shared(x), which a shared gate multiplies by sigmoid(shared_gate x).

    `experts` are E modules from (N, D) to (N, D): MLPs, adapter experts or other MoEBlocks. One object may appear
    several times. `shared_gate` (1, D) is that of Qwen2-MoE; it is not copied.
    Capacity counts all tokens of a call. A token whose assignments are all dropped gets zero from the experts; only the
    residual and the shared expert remain.
    Raises ArtifactError if the number of experts, the gate's shape or the capacity is invalid.
    """

    def __init__(
        self,
        router: Router,
        experts: Iterable[nn.Module],
        *,
        shared: nn.Module | None = None,
        shared_gate: torch.Tensor | None = None,
        capacity_factor: float | None = None,
        drop_policy: DropPolicy = "order",
    ) -> None:
        super().__init__()
        self.router = router
        self.capacity = Capacity(capacity_factor, policy=drop_policy)
        self.experts = nn.ModuleList(experts)
        self.shared = shared
        self.shared_gate = None if shared_gate is None else _linear(shared_gate)
        self._grouping, self._packing, self._one_token = Grouping(), Packing(), OneToken()
        _check(self)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The experts grouped by the weights they share. A new tuple after a change within the experts."""
        return self._grouping.of(self.experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D], the same shape and dtype."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        weights_TK, ids_TK, _ = self.capacity(self.router(hidden_TD))
        groups = self.groups
        packed = self._packing.of(groups, hidden_TD)
        out_TD = dispatch(
            hidden_TD, weights_TK, ids_TK, self.experts, groups=groups, packed=packed, one_token=self._one_token
        )
        if self.shared is not None:
            out_TD = out_TD + self._shared_output(self.shared, hidden_TD)
        return out_TD.reshape(hidden.shape)

    def keep_apart(self) -> None:
        """Leaves every expert's weights where they are, because they come to the device for one call only."""
        self._packing = Packing(off=True)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # .to() and similar calls move each weight separately, so the packed memory is no longer needed
        self._packing, self._one_token = Packing(), OneToken()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _shared_output(self, shared: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
        shared_TD: torch.Tensor = shared(hidden_TD)
        if self.shared_gate is None:
            return shared_TD
        scale_T1: torch.Tensor = self.shared_gate(hidden_TD).sigmoid()
        return scale_T1 * shared_TD


def _linear(weight_OI: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight_OI.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")  # meta: nothing to allocate or initialise
    linear.weight = nn.Parameter(weight_OI)
    return linear


def _check(block: MoEBlock) -> None:
    experts, hidden = block.router.weight.shape
    if len(block.experts) != experts:
        raise ArtifactError(
            f"a block's router scores {experts} experts, found {len(block.experts)} experts",
            hint="the gate needs one row per expert: fit or build the routers again",
        )
    if block.shared_gate is None:
        return
    if block.shared is None:
        raise ArtifactError("a block has a shared_gate but no shared expert", hint="give both, or neither")
    if block.shared_gate.weight.shape != (1, hidden):
        found = tuple(block.shared_gate.weight.shape)
        raise ArtifactError(
            f"a block's shared_gate must have shape (1, {hidden}), found {found}", hint="build the artifact again"
        )
