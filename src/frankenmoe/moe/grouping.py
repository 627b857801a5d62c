"""Finds the experts of a block that share weights, and notices when that changes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from frankenmoe.families import FAMILIES
from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.linear import Linear, is_linear

# The MLPs of transformers that compute exactly down(act(gate x) * up x), or down(act(up x)) without a gate -> their
# linear layers, down last. Others with the same names may compute more.
PLAIN_MLPS: Mapping[str, tuple[str, ...]] = {
    family.plain_mlp: family.linears for family in FAMILIES.values() if family.plain_mlp
}
REGISTRIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Plain:
    """The FFN under a group of adapter experts.

    `into` are the linear layers that read its input, by name: `act` of the first one's output, times those of the
    others, is what `down` reads.
    """

    into: Mapping[str, Linear]
    down: Linear
    act: nn.Module

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All its linear layers, down last."""
        return (*self.into.values(), self.down)


@dataclass(frozen=True)
class Group:
    """Experts that share work.

    `members` are their ids. Without `base`, all are the same `module`. With `base`, the i-th member is that FFN under
    the LoRAs `loras[i]`, by projection.
    """

    members: tuple[int, ...]
    module: nn.Module
    base: Plain | None = None
    loras: tuple[Mapping[str, LoraLinear], ...] = ()


class Transient:
    """State about the modules of one block. Copies of the block, and blocks read from a file, start without it."""

    def __reduce__(self) -> tuple[type["Transient"], tuple[()]]:
        return type(self), ()


class Grouping(Transient):
    """The groups of a block's experts, found again after a change within the experts."""

    def __init__(self) -> None:
        self._groups: tuple[Group, ...] = ()
        self._experts: tuple[int, ...] = ()
        self._watch = Watch([])

    def of(self, experts: nn.ModuleList) -> tuple[Group, ...]:
        """The same tuple as before, or a new one if an expert, or anything in it that `Watch` sees, changed."""
        now = tuple(map(id, experts))
        if self._experts != now or not self._watch.holds():
            self._experts, self._groups = now, group_experts(experts)
            self._watch = Watch([expert for expert in experts if projections(expert)])
        return self._groups


class Watch:
    """The former state of modules: submodules, parameters, buffers, adapters' scales, hooks and what is trained.

    Values of tensors and their addresses are not watched. `torch.compile` can trace `holds`.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        modules = list({module: None for root in roots for module in root.modules()})
        tables = [(module._modules, module._parameters, module._buffers) for module in modules]
        entries: list[tuple[Mapping[str, Any], str, Any]] = [
            *((table, name, part) for each in tables for table in each for name, part in table.items()),
            *((vars(module), "forward", vars(module).get("forward")) for module in modules),
        ]
        self._entries = tuple(entries)
        hooks = [vars(module)[registry] for module in modules for registry in REGISTRIES]
        self._silent = tuple(hook for hook in hooks if not hook)
        self._heard = tuple(hook for hook in hooks if hook)
        parameters = [part for module in modules for part in module._parameters.values() if part is not None]
        self._learning = [(part, part.requires_grad) for part in parameters]
        self._scales = [(module, module.scale) for module in modules if isinstance(module, LoraLinear)]

    def holds(self) -> bool:
        """Whether nothing was replaced, no hook was added or removed, and the same parameters are trained."""
        return (
            not any(self._silent)
            and all(self._heard)
            and all(owner.get(name) is part for owner, name, part in self._entries)
            and all(part.requires_grad == learns for part, learns in self._learning)
            and all(lora.scale == scale for lora, scale in self._scales)
        )


def group_experts(experts: Iterable[nn.Module]) -> tuple[Group, ...]:
    """Groups that contain every expert once, in the order of their first members."""
    found: dict[object, list[tuple[int, nn.Module]]] = {}
    for index, expert in enumerate(experts):
        found.setdefault(_key(expert), []).append((index, expert))
    return tuple(_group(entries) for entries in found.values())


def _group(entries: list[tuple[int, nn.Module]]) -> Group:
    members, modules = zip(*entries, strict=True)
    first = modules[0]
    if all(module is first for module in modules):
        return Group(members, first)
    return Group(members, first, plain(first), tuple(map(_loras, modules)))


def _key(expert: nn.Module) -> object:
    """Equal for experts that can share work: the same module, or adapters over the same FFN."""
    bases = [_base(expert, name) for name in projections(expert)]
    if not bases or not all(map(is_linear, bases)):
        return id(expert)
    if listened(expert, *(module for module in expert.modules() if isinstance(module, LoraLinear))):
        return id(expert)
    if any("forward" in vars(module) for module in expert.modules()):  # accelerate fetches offloaded weights there
        return id(expert)
    if bases[-1].bias is not None:  # it would need a weight too
        return id(expert)
    return type(expert), id(expert.act_fn), *(id(base.weight) for base in bases), *(id(base.bias) for base in bases)


def plain(expert: nn.Module) -> Plain:
    """The FFN of one of PLAIN_MLPS, without its adapters."""
    *names, down = projections(expert)
    return Plain({name: _base(expert, name) for name in names}, _base(expert, down), expert.get_submodule("act_fn"))


def listened(*modules: nn.Module) -> bool:
    """Whether one of these modules has hooks or its own `forward`, so that a call does more than its class says."""
    return any(
        "forward" in vars(module) or any(vars(module)[registry] for registry in REGISTRIES) for module in modules
    )


def projections(expert: nn.Module) -> tuple[str, ...]:
    """The names of the linear layers of one of PLAIN_MLPS; none for another module."""
    return PLAIN_MLPS.get(type(expert).__name__, ())


def _base(expert: nn.Module, name: str) -> Any:
    projection = getattr(expert, name)
    return projection.base if isinstance(projection, LoraLinear) else projection


def _loras(expert: nn.Module) -> Mapping[str, LoraLinear]:
    return {name: part for name in projections(expert) if isinstance(part := getattr(expert, name), LoraLinear)}
