"""Which experts hold the same weights, wholly or but for their adapters; computes nothing with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.linear import Linear, is_linear

# the MLPs of transformers that are down(act(gate x) * up x) and nothing else; others may do more under the same names
GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Olmo2MLP"})
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Gated:
    """The one FFN under a group of adapter experts: down(act(gate x) * up x)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    act: nn.Module


@dataclass(frozen=True)
class Group:
    """Experts that share the work.

    `members` are their ids. Without `base` they are all the same `module`. With it they are that FFN under the LoRAs
    of `loras[i]`, by projection, for the i-th member.
    """

    members: tuple[int, ...]
    module: nn.Module
    base: Gated | None = None
    loras: tuple[Mapping[str, LoraLinear], ...] = ()


def group_experts(experts: Iterable[nn.Module]) -> tuple[Group, ...]:
    """Every expert in one group, groups in the order of their first members."""
    found: dict[object, list[tuple[int, nn.Module]]] = {}
    for index, expert in enumerate(experts):
        found.setdefault(_key(expert), []).append((index, expert))
    return tuple(_group(entries) for entries in found.values())


def _group(entries: list[tuple[int, nn.Module]]) -> Group:
    members, modules = zip(*entries, strict=True)
    first = modules[0]
    if all(module is first for module in modules):
        return Group(members, first)
    return Group(members, first, parts_of(first), tuple(map(loras_of, modules)))


def _key(expert: nn.Module) -> object:
    """Equal for experts that can share work: the same module, or adapters over the same FFN."""
    parts = parts_of(expert)
    if parts is None:
        return id(expert)
    bases = (parts.gate_proj, parts.up_proj, parts.down_proj)
    return type(expert), id(parts.act), *(id(base.weight) for base in bases), *(id(base.bias) for base in bases)


def parts_of(expert: nn.Module) -> Gated | None:
    """The FFN under an expert's adapters, if it has any; None where it may compute something else, or is listened to.

    A bias on `down` would have to be weighted too, so that is something else.
    """
    if type(expert).__name__ not in GATED_MLPS or expert._forward_hooks or expert._forward_pre_hooks:
        return None
    projections = [getattr(expert, name) for name in PROJECTIONS]
    if not all(map(_is_linear, projections)) or not isinstance(expert.act_fn, nn.Module):
        return None
    gate, up, down = map(_base, projections)
    return None if down.bias is not None else Gated(gate, up, down, expert.act_fn)


def loras_of(expert: nn.Module) -> Mapping[str, LoraLinear]:
    """An expert's adapters, by projection."""
    return {name: found for name in PROJECTIONS if isinstance(found := getattr(expert, name, None), LoraLinear)}


def _is_linear(module: object) -> bool:
    return isinstance(module, LoraLinear) or is_linear(module)


def _base(projection: nn.Module) -> Linear:
    base = projection.base if isinstance(projection, LoraLinear) else projection
    assert is_linear(base)
    return base
