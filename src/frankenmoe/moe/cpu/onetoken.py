"""One token through its experts on a CPU, in one call of a kernel."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from frankenmoe.moe.grouping import Group, Transient, listened, plain, projections
from frankenmoe.moe.linear import KINDS, LOW_KINDS, SMALL, Int8Linear, have_addresses, is_linear, is_row, kernels

# D hidden, F ffn, K top-k

GATE_UP_DOWN = 3  # matrices of the only kind of FFN with a kernel
SILU = frozenset({"SiLU", "SiLUActivation"})  # torch's and transformers' names of the only activation with a kernel


class Prepared(NamedTuple):
    """An expert as the kernel takes it."""

    ffn: int  # the same for experts over the same FFN
    dtype: torch.dtype
    low: torch.dtype | None  # of its adapters
    sizes: tuple[int, int]  # D, F
    member: Any
    places: tuple[tuple[torch.Tensor, int, torch.Size, torch.dtype], ...]

    def holds(self) -> bool:
        """Whether every tensor still lies where it lay, with the same shape and type."""
        return all(
            tensor.data_ptr() == address and tensor.shape == shape and tensor.dtype == dtype
            for tensor, address, shape, dtype in self.places
        )


class OneToken(Transient):
    """Computes one token, and keeps the prepared experts of a block for the next."""

    def __init__(self) -> None:
        self._groups: Sequence[Group] | None = None
        self._group_of: dict[int, Group] = {}
        self._prepared: dict[int, Prepared] = {}

    def mix(
        self, hidden_1D: torch.Tensor, weights_1K: torch.Tensor, ids_1K: torch.Tensor, groups: Sequence[Group]
    ) -> torch.Tensor | None:
        """out_1D: the sum of a token's experts' outputs times their weights; None if the kernel cannot compute it.

        The kernel takes 16-bit and int8 FFNs that are down(silu(gate x) * up x), with or without adapters, where
        nothing learns, has a hook or is traced. Sums are float32; only `hidden_1D` and the result are rounded.
        `groups` must be a new object when anything within the experts was replaced or got a hook.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not have_addresses(hidden_1D):
            return None
        compiled = kernels()
        if compiled is None or hidden_1D.dtype not in LOW_KINDS:
            return None
        if self._groups is not groups:
            self._groups, self._prepared = groups, {}
            self._group_of = {member: group for group in groups for member in group.members}
        experts, weights = [], []
        for member, weight in zip(ids_1K[0].tolist(), weights_1K[0].tolist(), strict=True):
            if member < 0:  # dropped
                continue
            expert = self._expert(member, compiled)
            if expert is None:
                return None
            experts.append(expert)
            weights.append(weight)
        if not experts or not _go_together(hidden_1D, experts):
            return None
        wide_1D = hidden_1D.float().contiguous()
        out_1D = torch.empty_like(wide_1D)
        low = next((expert.low for expert in experts if expert.low is not None), torch.float32)
        compiled.ffns(
            wide_1D.data_ptr(),
            out_1D.data_ptr(),
            [(expert.ffn, expert.member, weight) for expert, weight in zip(experts, weights, strict=True)],
            sizes=experts[0].sizes,
            kinds=(KINDS[experts[0].dtype], LOW_KINDS[low]),
            threads=torch.get_num_threads(),
        )
        return out_1D.to(hidden_1D.dtype)

    def _expert(self, member: int, compiled: ModuleType) -> Prepared | None:
        found = self._prepared.get(member)
        if found is not None and found.holds():
            return found
        new = _prepare(self._group_of[member], member, compiled)
        if new is not None:
            self._prepared[member] = new
        return new


def _go_together(hidden_1D: torch.Tensor, experts: Sequence[Prepared]) -> bool:
    first = experts[0]
    return (
        hidden_1D.shape[1] == first.sizes[0]
        and (hidden_1D.dtype == first.dtype or first.dtype == torch.int8)
        and all((expert.sizes, expert.dtype) == (first.sizes, first.dtype) for expert in experts[1:])
        and len({expert.low for expert in experts} - {None}) <= 1
    )


def _prepare(group: Group, member: int, compiled: ModuleType) -> Prepared | None:
    """None for an expert that computes something else, or that has a hook."""
    names = projections(group.module)
    if len(names) != GATE_UP_DOWN or (group.base is None and listened(group.module)):
        return None
    base = group.base or plain(group.module)
    linears = base.linears
    if type(base.act).__name__ not in SILU or not all(map(is_linear, linears)) or listened(*linears, base.act):
        return None
    loras = group.loras[group.members.index(member)] if group.loras else {}
    weights = [part.weight for part in linears]
    scales = [part.scale if isinstance(part, Int8Linear) else None for part in linears]
    low = [weight for lora in loras.values() for weight in (lora.a, lora.b)]
    tensors = [*weights, *low, *(scale for scale in scales if scale is not None)]
    ffn, hidden = weights[0].shape
    if not (
        ffn * hidden >= SMALL
        and [weight.shape for weight in weights] == [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
        and weights[0].dtype in KINDS
        and len({weight.dtype for weight in weights}) == 1
        and all(part.bias is None for part in linears)
        and all(
            weight.dtype != torch.int8 if scale is None else is_row(scale, weight)
            for weight, scale in zip(weights, scales, strict=True)
        )
        and all(lora.fits() for lora in loras.values())
        and all(weight.dtype in LOW_KINDS for weight in low)
        and len({weight.dtype for weight in low}) <= 1
        and have_addresses(*tensors)
        and all(tensor.is_contiguous() for tensor in tensors)
    ):
        return None
    given = (loras.get(name) for name in names)
    return Prepared(
        ffn=group.members[0],
        dtype=weights[0].dtype,
        low=low[0].dtype if low else None,
        sizes=(hidden, ffn),
        member=compiled.member(
            [
                (weight.data_ptr(), 0 if scale is None else scale.data_ptr())
                for weight, scale in zip(weights, scales, strict=True)
            ],
            [lora and (lora.a.data_ptr(), lora.b.data_ptr(), lora.a.shape[0], lora.scale) for lora in given],
        ),
        places=tuple((each, each.data_ptr(), each.shape, each.dtype) for each in tensors),
    )
