"""Finds the experts of a block that share weights, and notices when that changes. Computes nothing with them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.moe.linear import Linear, is_linear

# the MLPs of transformers that are down(act(gate x) * up x) and nothing else; others may do more under the same names
GATED_MLPS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Olmo2MLP"})
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
REGISTRIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


class Transient:
    """State that a copy of a block, or a block read from a file, does not inherit: it is about other modules."""

    def __reduce__(self) -> tuple[type["Transient"], tuple[()]]:
        return type(self), ()


class Grouping(Transient):
    """The groups of a block's experts, as long as nothing changes within the experts."""

    def __init__(self) -> None:
        self._groups: tuple[Group, ...] = ()
        self._experts: tuple[int, ...] = ()
        self._watch = Watch([])

    def of(self, experts: nn.ModuleList) -> tuple[Group, ...]:
        """The same tuple as before, or a new one if an expert, or anything that `Watch` sees within one, changed."""
        now = tuple(map(id, experts))
        if self._experts != now or not self._watch.holds():
            self._experts, self._groups = now, group_experts(experts)
            self._watch = Watch([expert for expert in experts if _is_gated(expert)])
        return self._groups


class Watch:
    """What modules were like: parts, parameters, buffers, adapters' scales, and who listens.

    Numbers are not watched, nor where they lie in memory. `torch.compile` can trace `holds`.
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
        """Whether nothing was replaced, no hook came or went, and the same parameters learn."""
        return (
            not any(self._silent)
            and all(self._heard)
            and all(owner.get(name) is part for owner, name, part in self._entries)
            and all(part.requires_grad == learns for part, learns in self._learning)
            and all(lora.scale == scale for lora, scale in self._scales)
        )


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
    return Group(members, first, gated(first), tuple(map(_loras, modules)))


def _key(expert: nn.Module) -> object:
    """Equal for experts that can share work: the same module, or adapters over the same FFN."""
    if not _is_gated(expert) or not all(is_linear(_base(expert, name)) for name in PROJECTIONS):
        return id(expert)
    if listened(expert, *(module for module in expert.modules() if isinstance(module, LoraLinear))):
        return id(expert)
    if any("forward" in vars(module) for module in expert.modules()):  # accelerate fetches offloaded weights there
        return id(expert)
    bases = [_base(expert, name) for name in PROJECTIONS]
    if bases[-1].bias is not None:  # it would have to be weighted too
        return id(expert)
    return type(expert), id(expert.act_fn), *(id(base.weight) for base in bases), *(id(base.bias) for base in bases)


def gated(expert: nn.Module) -> Gated:
    """The FFN of one of GATED_MLPS, without its adapters."""
    gate, up, down = (_base(expert, name) for name in PROJECTIONS)
    return Gated(gate, up, down, expert.get_submodule("act_fn"))


def listened(*modules: nn.Module) -> bool:
    """Whether calling one of these does more than its class says: it has hooks, or a `forward` of its own."""
    return any(
        "forward" in vars(module) or any(vars(module)[registry] for registry in REGISTRIES) for module in modules
    )


def _is_gated(expert: nn.Module) -> bool:
    return type(expert).__name__ in GATED_MLPS


def _base(expert: nn.Module, name: str) -> Any:
    projection = getattr(expert, name)
    return projection.base if isinstance(projection, LoraLinear) else projection


def _loras(expert: nn.Module) -> Mapping[str, LoraLinear]:
    return {name: found for name in PROJECTIONS if isinstance(found := getattr(expert, name, None), LoraLinear)}
