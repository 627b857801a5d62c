"""Which experts hold the same weights, wholly or but for their adapters; computes nothing with them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.linear import Linear, is_linear

# the MLPs of transformers that are down(act(gate x) * up x) and nothing else; others may do more under the same names
GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Olmo2MLP"})
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
REGISTRIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Entry = tuple[Mapping[str, object], str, object]


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


class Watch(NamedTuple):
    """What must be as it was: entries (owner, name, what stands there) of modules' tables, and hooks, of which none."""

    parts: tuple[Entry, ...] = ()
    hooks: tuple[Mapping[int, object], ...] = ()

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        """A copy, or what is read from a file, has nothing to watch: its modules are others, and grouped anew."""
        return Watch, ()

    def holds(self) -> bool:
        """Asked for at every forward: nothing replaced, and nobody listens."""
        return not any(self.hooks) and all(owner.get(name) is part for owner, name, part in self.parts)


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
    gate, up, down = (_base(first, name) for name in PROJECTIONS)
    assert isinstance(first.act_fn, nn.Module)
    return Group(members, first, Gated(gate, up, down, first.act_fn), tuple(map(_loras, modules)))


def _key(expert: nn.Module) -> object:
    """Equal for experts that can share work: the same module, or adapters over the same FFN."""
    if type(expert).__name__ not in GATED_MLPS or not all(_is_linear(getattr(expert, name)) for name in PROJECTIONS):
        return id(expert)
    if listened(expert, *(module for module in expert.modules() if isinstance(module, LoraLinear))):
        return id(expert)
    if any("forward" in vars(module) for module in expert.modules()):  # accelerate brings weights there
        return id(expert)
    bases = [_base(expert, name) for name in PROJECTIONS]
    if bases[-1].bias is not None:  # it would have to be weighted too
        return id(expert)
    return type(expert), id(expert.act_fn), *(id(base.weight) for base in bases), *(id(base.bias) for base in bases)


def within(groups: Iterable[Group], experts: Sequence[nn.Module] | nn.ModuleList) -> Watch:
    """What these groups depend on within experts that share an FFN; the others are called as they are."""
    parts: dict[tuple[int, str], Entry] = {}
    hooks: list[Mapping[int, object]] = []
    for expert in (experts[member] for group in groups if group.base is not None for member in group.members):
        layers = [getattr(expert, name) for name in PROJECTIONS]
        loras = [layer for layer in layers if isinstance(layer, LoraLinear)]
        bases = [_base(expert, name) for name in PROJECTIONS]
        entries: list[Entry] = [
            *((expert._modules, name, expert._modules[name]) for name in (*PROJECTIONS, "act_fn")),
            *((lora._modules, "base", lora.base) for lora in loras),
            *((base._parameters, "weight", base._parameters.get("weight")) for base in bases),
            *((vars(module), "forward", None) for module in (expert, *loras)),
        ]
        parts |= {(id(owner), name): (owner, name, part) for owner, name, part in entries}
        hooks += [vars(module)[registry] for module in (expert, *loras) for registry in REGISTRIES]
    return Watch(tuple(parts.values()), tuple(hooks))


def listened(*modules: nn.Module) -> bool:
    """Whether calling one of these does more than its class says."""
    for module in modules:
        own = module.__dict__  # sooner than through attributes
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
        if "forward" in own:
            return True
    return False


def _is_linear(module: object) -> bool:
    return is_linear(module.base if isinstance(module, LoraLinear) else module)


def _base(expert: nn.Module, name: str) -> Linear:
    projection = getattr(expert, name)
    base = projection.base if isinstance(projection, LoraLinear) else projection
    assert is_linear(base)
    return base


def _loras(expert: nn.Module) -> Mapping[str, LoraLinear]:
    return {name: found for name in PROJECTIONS if isinstance(found := getattr(expert, name, None), LoraLinear)}
