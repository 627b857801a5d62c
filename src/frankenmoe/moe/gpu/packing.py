"""Packs the experts of a layer into a few large tensors, which grouped products on a GPU need."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import nn

from frankenmoe.errors import FrankenMoEWarning
from frankenmoe.moe.grouping import Group, Transient, listened, projections
from frankenmoe.moe.linear import is_linear

# E experts, D hidden, F ffn, R rank, I inputs, O outputs

DEVICES = frozenset({"cuda"})  # on other devices the experts run one after another, unpacked
OFTEN = 8  # times that a block packs the same experts
MOVED = (
    f"the weights of an MoE block were moved or replaced {OFTEN} times. Its experts are no longer packed for the GPU; "
    "they run one after another, which is slower"
)
ALIGNMENT = 16  # rows of a grouped product must be a multiple of this many bytes


@dataclass(frozen=True)
class Distinct:
    """Experts with different weights and no bias. `place_E` maps ids to rows of the tensors; None if they are equal.

    `into_EOI` has what reads the input: the rows of gate and then of up, or of up alone.
    """

    into_EOI: torch.Tensor
    down_EOI: torch.Tensor
    act: nn.Module
    place_E: torch.Tensor | None

    @property
    def like(self) -> torch.Tensor:
        """One of the weights. All have the same dtype and device."""
        return self.down_EOI

    @property
    def aligned(self) -> bool:
        """Whether a grouped product can compute these sizes."""
        return all(size * self.like.itemsize % ALIGNMENT == 0 for size in self.like.shape[1:])


@dataclass(frozen=True)
class LowRank:
    """The adapters of all experts on one projection. Zeros fill up smaller ranks and missing adapters."""

    a_ERI: torch.Tensor
    b_EOR: torch.Tensor
    scale_E: torch.Tensor


@dataclass(frozen=True)
class Adapted:
    """Adapters over one FFN, by projection. `low_rank` is None in training: A and B are then stacked in every call."""

    group: Group
    scales: Mapping[str, torch.Tensor]
    low_rank: Mapping[str, LowRank] | None

    @property
    def like(self) -> torch.Tensor:
        """One of the weights. All have the same dtype and device."""
        assert self.group.base is not None
        return self.group.base.down.weight

    @property
    def aligned(self) -> bool:
        """Whether a grouped product can compute these sizes."""
        return all(size * self.like.itemsize % ALIGNMENT == 0 for size in self.like.shape)


Packed = Distinct | Adapted


class Packing(Transient):
    """The packed experts of a block. `off` packs nothing: the experts are on the device for one call only."""

    def __init__(self, *, off: bool = False) -> None:
        self.off = off
        self._first: Group | None = None  # of the groups that are packed
        self._weights: Sequence[torch.Tensor] = ()
        self._addresses: Sequence[int] = ()
        self._times = 0
        self._packed: Packed | None = None

    def of(self, groups: Sequence[Group], hidden_TD: torch.Tensor) -> Packed | None:
        """The packed groups. None if they cannot be packed or `hidden_TD` is not on a GPU.

        `groups` must be a new object after anything within the experts was replaced, got a hook or became trainable.
        Weights that moved are packed again, without waiting for the device. This happens at most OFTEN times, because
        two blocks that share an expert would otherwise pack it in turns.
        """
        if self.off or hidden_TD.device.type not in DEVICES:
            return None
        same = groups[0] is self._first  # torch.compile cannot compare tuples by identity
        if torch.compiler.is_compiling():  # addresses cannot be traced
            return self._packed if same else None
        if not same or [weight.data_ptr() for weight in self._weights] != self._addresses:
            if _is_captured(hidden_TD):  # a CUDA graph would repeat the copies at every replay
                return None
            if not same:
                self._times = 0
            self._packed = None  # frees its memory before the next packing
            self._packed = pack(groups) if self._times < OFTEN else None
            if self._times == OFTEN:
                warnings.warn(MOVED, FrankenMoEWarning, stacklevel=2)
            self._times += self._packed is not None
            self._first, self._weights = groups[0], _weights(groups)
            self._addresses = [weight.data_ptr() for weight in self._weights]
        return self._packed


def pack(groups: Sequence[Group]) -> Packed | None:
    """Moves the weights of these groups into a few large tensors; the modules keep views. None if nothing moves.

    Nothing moves if experts differ in shape, dtype or activation, have biases or hooks, are trained, or are blocks; if
    adapters have another dtype than their base; or if only some experts are adapters. Equal experts stay too: they are
    one product. In distributed runs nothing moves, because FSDP may gather and free weights at any time.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    with torch.inference_mode(False), torch.no_grad():  # the tensors may be used in training later
        if len(groups) == 1:
            return None if groups[0].base is None else _pack_adapted(groups[0])
        if any(group.base is not None for group in groups):
            return None
        return _pack_distinct(groups)


def stacked(packed: Adapted) -> Mapping[str, LowRank]:
    """The adapters by projection. Trained adapters get gradients."""
    if packed.low_rank is not None:
        return packed.low_rank
    return {name: _stack(packed.group, name, scale_E) for name, scale_E in packed.scales.items()}


def _pack_distinct(groups: Sequence[Group]) -> Distinct | None:
    experts = [group.module for group in groups]
    if not all(map(_is_plain, experts)) or len({_kind(expert) for expert in experts}) > 1:
        return None
    act = experts[0].get_submodule("act_fn")
    if not all(_same(act, expert.get_submodule("act_fn")) for expert in experts):
        return None
    weights = [[_weight(expert, name) for name in projections(expert)] for expert in experts]
    ffn, hidden = weights[0][0].shape
    into_EOI = weights[0][0].new_empty(len(experts), (len(weights[0]) - 1) * ffn, hidden)
    down_EOI = weights[0][0].new_empty(len(experts), hidden, ffn)
    for place, (*into, down) in enumerate(weights):  # one by one, which frees each weight's memory at once
        for index, weight in enumerate(into):
            _move(weight, into_EOI[place, index * ffn : (index + 1) * ffn])
        _move(down, down_EOI[place])
    place_of = {member: place for place, group in enumerate(groups) for member in group.members}
    places = [place_of[member] for member in sorted(place_of)]
    shifted = places != list(range(len(places)))
    return Distinct(into_EOI, down_EOI, act, torch.tensor(places, device=down_EOI.device) if shifted else None)


def _pack_adapted(group: Group) -> Adapted | None:
    base = group.base
    assert base is not None
    frozen = [linear.weight for linear in base.linears]
    learned = [weight for loras in group.loras for lora in loras.values() for weight in (lora.a, lora.b)]
    if len({(weight.dtype, weight.device) for weight in (*frozen, *learned)}) > 1 or not learned:
        return None
    names = [name for name in projections(group.module) if any(name in loras for loras in group.loras)]
    scales = {name: _scales(group, name) for name in names}
    if any(weight.requires_grad for weight in learned):
        return Adapted(group, scales, None)
    low_rank = {name: _stack(group, name, scale_E) for name, scale_E in scales.items()}
    for place, loras in enumerate(group.loras):
        for name, lora in loras.items():
            rank = lora.a.shape[0]
            _move(lora.a, low_rank[name].a_ERI[place, :rank])
            _move(lora.b, low_rank[name].b_EOR[place, :, :rank])
    return Adapted(group, scales, low_rank)


def _scales(group: Group, name: str) -> torch.Tensor:
    found = [loras.get(name) for loras in group.loras]
    like = next(lora for lora in found if lora is not None).a
    scales = [0.0 if lora is None else lora.scale for lora in found]
    # in 16 bits the error of a scale would be up to 0.4 %, with the same sign for every token
    return torch.tensor(scales, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _stack(group: Group, name: str, scale_E: torch.Tensor) -> LowRank:
    found = [loras.get(name) for loras in group.loras]
    present = [lora for lora in found if lora is not None]
    like, unit = present[0], ALIGNMENT // present[0].a.itemsize
    rank = -(-max(lora.a.shape[0] for lora in present) // unit) * unit
    none_a, none_b = like.a.new_zeros(rank, like.a.shape[1]), like.b.new_zeros(like.b.shape[0], rank)
    a = [none_a if lora is None else nn.functional.pad(lora.a, (0, 0, 0, rank - lora.a.shape[0])) for lora in found]
    b = [none_b if lora is None else nn.functional.pad(lora.b, (0, rank - lora.b.shape[1])) for lora in found]
    return LowRank(torch.stack(a), torch.stack(b), scale_E)


def _move(weight: torch.Tensor, to: torch.Tensor) -> None:
    """Moves a parameter's data into `to`. The parameter object stays, so every reference sees the new data."""
    to.copy_(weight)
    if weight.is_cuda:  # no other stream may reuse its memory before it is copied
        weight.record_stream(torch.cuda.current_stream(weight.device))
    weight.data = to


def _is_captured(hidden: torch.Tensor) -> bool:
    return hidden.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_plain(expert: nn.Module) -> bool:
    """Whether an expert is one of PLAIN_MLPS, with frozen linear layers that have no biases and no hooks."""
    names = projections(expert)
    if not names or not isinstance(expert.act_fn, nn.Module):
        return False
    if listened(expert, expert.act_fn):
        return False
    linears = [expert._modules.get(name) for name in names]
    return all(
        isinstance(linear, nn.Linear)
        and is_linear(linear)
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and not linear.weight.requires_grad
        and not listened(linear)
        for linear in linears
    )


def _kind(expert: nn.Module) -> object:
    """Equal for experts that one grouped product can compute."""
    names = projections(expert)
    weights = (_weight(expert, name) for name in names)
    return names, *((weight.shape, weight.dtype, weight.device) for weight in weights)


def _weight(expert: nn.Module, name: str) -> torch.Tensor:
    weight = expert.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _same(act: nn.Module, other: nn.Module) -> bool:
    """Whether two activations are the same function. False in case of doubt."""
    if act is other:
        return True
    if type(act) is not type(other) or act._parameters or act._buffers or act._modules:
        return False
    mine, theirs = (
        # transformers sets private attributes on some modules only
        {name: value for name, value in vars(each).items() if not name.startswith("_") and name != "training"}
        for each in (act, other)
    )
    return mine == theirs


def _weights(groups: Sequence[Group]) -> Sequence[torch.Tensor]:
    """All weights of the groups' experts, adapters included, except the base under adapters."""
    own: list[torch.Tensor] = [weight for group in groups for weight in group.module.parameters() if group.base is None]
    return own + [
        weight for group in groups for row in group.loras for lora in row.values() for weight in (lora.a, lora.b)
    ]
