"""One token through its experts on a CPU, all of them in one call; does not know how it was routed."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.grouping import GATED_MLPS, PROJECTIONS, Gated, Group, Watch
from frankenmoe.moe.linear import FLOAT_KINDS, KINDS, SMALL, Int8Linear, have_addresses, is_linear, is_row, kernels

# D hidden, F ffn, K top-k

SILU = frozenset({"SiLU", "SiLUActivation"})  # what torch and transformers call the one activation that is compiled


class Prepared(NamedTuple):
    """An expert as the kernel wants it, and everything that must be as it was for that to hold."""

    ffn: int  # the same for experts over the same FFN
    dtype: torch.dtype
    low: torch.dtype | None  # of its adapters
    sizes: tuple[int, int]  # D, F
    member: Any
    watch: Watch
    places: tuple[tuple[torch.Tensor, int, torch.Size, torch.dtype], ...]

    def holds(self) -> bool:
        """Asked for at every token: nothing replaced, moved, or listened to."""
        return (
            self.watch.holds()
            # memory that was freed may be lent again at the same address, for other numbers
            and all(
                tensor.data_ptr() == address and tensor.shape == shape and tensor.dtype == dtype
                for tensor, address, shape, dtype in self.places
            )
        )


class OneToken:
    """The experts of a block that a token went through before, prepared."""

    def __init__(self) -> None:
        self._groups: Sequence[Group] | None = None
        self._group_of: dict[int, Group] = {}
        self._prepared: dict[int, Prepared] = {}

    def __reduce__(self) -> tuple[type["OneToken"], tuple[()]]:
        """A copy, or what is read from a file, begins anew: addresses are not its own."""
        return OneToken, ()

    def mix(
        self, hidden_1D: torch.Tensor, weights_1K: torch.Tensor, ids_1K: torch.Tensor, groups: Sequence[Group]
    ) -> torch.Tensor | None:
        """out_1D: the sum of a token's experts' outputs times their weights; None: has to be computed otherwise.

        Takes 16-bit and int8 FFNs that are down(silu(gate x) * up x), under adapters or not, while nothing learns,
        nobody listens and nothing is traced. Sums are taken in float32; only `hidden_1D` and the result are rounded.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not have_addresses(hidden_1D):
            return None
        compiled = kernels()
        if compiled is None or hidden_1D.dtype not in FLOAT_KINDS:
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
        hidden_1D = hidden_1D.contiguous()
        out_1D = torch.empty_like(hidden_1D)
        low = next((expert.low for expert in experts if expert.low is not None), torch.float32)
        compiled.ffns(
            hidden_1D.data_ptr(),
            out_1D.data_ptr(),
            [(expert.ffn, expert.member, weight) for expert, weight in zip(experts, weights, strict=True)],
            sizes=experts[0].sizes,
            kinds=(KINDS[experts[0].dtype], FLOAT_KINDS[low], FLOAT_KINDS[hidden_1D.dtype]),
            threads=torch.get_num_threads(),
        )
        return out_1D

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
    """None for an expert that computes something else, or does more than compute."""
    if group.base is None and type(group.module).__name__ not in GATED_MLPS:
        return None
    mlp = None if group.base else group.module
    base = group.base or Gated(*(group.module._modules[name] for name in (*PROJECTIONS, "act_fn")))  # type: ignore[arg-type]
    linears = [base.gate_proj, base.up_proj, base.down_proj]
    if type(base.act).__name__ not in SILU or not all(is_linear(part) and part.bias is None for part in linears):
        return None
    loras = group.loras[group.members.index(member)] if group.loras else {}
    weights = [part.weight for part in linears]
    low = [weight for lora in loras.values() for weight in (lora.a, lora.b)]
    scales = [part.scale for part in linears if isinstance(part, Int8Linear)]
    ffn, hidden = weights[0].shape
    if not (
        ffn * hidden >= SMALL
        and [weight.shape for weight in weights] == [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
        and weights[0].dtype in KINDS
        and len({weight.dtype for weight in weights}) == 1
        and all(isinstance(part, Int8Linear) == (part.weight.dtype == torch.int8) for part in linears)
        and all(is_row(part.scale, part.weight) for part in linears if isinstance(part, Int8Linear))
        and all(lora.fits() for lora in loras.values())
        and all(weight.dtype in FLOAT_KINDS for weight in low)
        and len({weight.dtype for weight in low}) <= 1
        and have_addresses(*weights, *low, *scales)
        and all(tensor.is_contiguous() for tensor in (*weights, *low, *scales))
    ):
        return None
    modules: list[nn.Module] = [*linears, base.act, *([] if mlp is None else [mlp])]
    hooks = tuple(each for part in modules for each in (part._forward_hooks, part._forward_pre_hooks))
    parts = [
        *((vars(part), "forward", None) for part in modules),  # accelerate gives a module a forward of its own
        *((part._buffers, "int8", part.int8) for part in linears if isinstance(part, Int8Linear)),
        *((part._buffers, "scale", part.scale) for part in linears if isinstance(part, Int8Linear)),
        *((part._parameters, "weight", part.weight) for part in linears if isinstance(part, nn.Linear)),
        *((part._parameters if isinstance(part, nn.Linear) else part._buffers, "bias", None) for part in linears),
        *((vars(lora), "scale", lora.scale) for lora in loras.values()),
        *((lora._parameters, name, getattr(lora, name)) for lora in loras.values() for name in ("a", "b")),
        *(() if mlp is None else ((mlp._modules, name, mlp._modules[name]) for name in (*PROJECTIONS, "act_fn"))),
    ]
    found = Prepared(
        ffn=group.members[0],
        dtype=weights[0].dtype,
        low=low[0].dtype if low else None,
        sizes=(hidden, ffn),
        member=compiled.Member(
            [
                (part.weight.data_ptr(), part.scale.data_ptr() if isinstance(part, Int8Linear) else 0)
                for part in linears
            ],
            [_low_rank(loras.get(name)) for name in PROJECTIONS],
        ),
        watch=Watch(tuple(parts), hooks),
        places=tuple((each, each.data_ptr(), each.shape, each.dtype) for each in (*weights, *low, *scales)),
    )
    return found if found.holds() else None


def _low_rank(lora: LoraLinear | None) -> tuple[int, int, int, float] | None:
    return None if lora is None else (lora.a.data_ptr(), lora.b.data_ptr(), lora.a.shape[0], lora.scale)
