"""Finds the parts of a running MoE that will be trained, and gives them their own float32 weights.

Frozen weights stay mapped from their source. Mapped pages are shared by the whole process, so trained weights are
copied first. Every trained tensor has a name:
`router/NAME`, `norm/NAME`, `embedding/NAME`, `attention/LINEAR/a|b`, `adapter/PATH/LINEAR/a|b`, `expert/PATH/NAME`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frankenmoe.errors import PlanError
from frankenmoe.families import OPAQUE
from frankenmoe.moe.adapter import LoraLinear, with_adapter, wrap_linear
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.tree import tensor_seed

# R rank, I inputs, O outputs


@dataclass(frozen=True)
class Slot:
    """Where a trained tensor is: an attribute of a module. Sharding replaces the tensor, but not the attribute."""

    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        found = getattr(self.module, self.attribute)
        assert isinstance(found, nn.Parameter)
        return found


@dataclass(frozen=True)
class ExpertPlace:
    """An expert in one layer: its module, and how to replace it."""

    node: ExpertNode
    layer: int
    module: nn.Module
    put: Callable[[nn.Module], None]

    @property
    def path(self) -> str:
        return ".".join(map(str, self.node.path))

    def dense_name(self, suffix: str) -> str:
        """The name of a tensor in the dense model, given its name within the FFN."""
        return self.node.ffn[self.layer][suffix].name


Slots = dict[str, Slot]


def make_learnable(
    model: Any, what: tuple[str, ...], *, plan: Plan | None, gate_names: Mapping[nn.Module, str], rank: int, seed: int
) -> Slots:
    """Gives every part in `what` its own float32 weights, which alone require gradients.

    `plan` is None for a built artifact, whose routers alone can learn. Raises PlanError for a part that this MoE lacks.
    """
    model.requires_grad_(False)
    slots: Slots = {}
    places = list(expert_places(model, plan)) if plan else []
    makers: Mapping[str, Callable[[], Slots]] = {
        "routers": lambda: _routers(gate_names),
        "norms": lambda: _norms(model),
        "embeddings": lambda: _embeddings(model),
        "experts": lambda: _experts(places),
        "adapters": lambda: _adapters(list(expert_places(model, plan)) if plan else [], rank=rank, seed=seed),
        "attention": lambda: _attention(model, rank=rank, seed=seed),
    }
    for part, make in makers.items():
        if part not in what:
            continue
        found = make()
        if not found:
            raise PlanError(
                f"this {type(model).__name__} has no {part} to train",
                hint=f"leave {part} out of --what",
            )
        slots |= found
    return slots


def gate_modules(model: nn.Module, names: Callable[[tuple[int, ...]], Mapping[int, str]]) -> dict[nn.Module, str]:
    """Every module whose `weight` is a gate -> the gate's name in the routers file."""
    found: dict[nn.Module, str] = {}

    def visit(block: MoEBlock, path: tuple[int, ...], layer: int) -> None:
        found[block.router] = names(path)[layer]
        for index, expert in enumerate(block.experts):
            if isinstance(expert, MoEBlock):
                visit(expert, (*path, index), layer)

    for layer, block in outer_blocks(model).items():
        visit(block, (), layer)
        if block.shared_gate is not None:
            found[block.shared_gate] = names(SHARED)[layer]
    return found


def expert_places(model: nn.Module, plan: Plan) -> Iterator[ExpertPlace]:
    """Every FFN of every layer, including nested and shared ones."""
    for layer, block in outer_blocks(model).items():
        yield from _places(block, plan.nodes, layer)
        if plan.shared and block.shared is not None:
            yield ExpertPlace(plan.shared[0], layer, block.shared, _setter(block, "shared"))


def _places(block: MoEBlock, nodes: tuple[ExpertNode, ...], layer: int) -> Iterator[ExpertPlace]:
    for index, node in enumerate(nodes):
        module = block.experts[index]
        if node.children:
            assert isinstance(module, MoEBlock)
            yield from _places(module, node.children, layer)
        else:
            yield ExpertPlace(node, layer, module, _setter(block.experts, str(index)))


def _setter(owner: nn.Module, name: str) -> Callable[[nn.Module], None]:
    return lambda module: setattr(owner, name, module)


def _own(module: nn.Module, attribute: str) -> Slot:
    """Replaces a parameter by a float32 copy."""
    parameter = nn.Parameter(getattr(module, attribute).detach().to(torch.float32, copy=True))
    setattr(module, attribute, parameter)
    return Slot(module, attribute)


def _routers(gate_names: Mapping[nn.Module, str]) -> Slots:
    return {f"router/{name}": _own(module, "weight") for module, name in gate_names.items()}


def _backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = [name for name, module in model.named_modules() if isinstance(module, MoEBlock)]
    for name, module in model.named_modules():
        if not any(name == block or name.startswith(f"{block}.") for block in inside):
            yield name, module


def _norms(model: nn.Module) -> Slots:
    return {
        f"norm/{name}.{key}": _own(module, key)
        for name, module in _backbone_modules(model)
        if "norm" in type(module).__name__.lower()
        for key, _ in list(module.named_parameters(recurse=False))
    }


def _embeddings(model: Any) -> Slots:
    """The input embeddings, and the head if it has its own weight; tied ones stay tied."""
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = head is not None and head.weight is entry.weight
    slots = {f"embedding/{names[entry]}.weight": _own(entry, "weight")}
    if tied:
        head.weight = entry.weight
    elif isinstance(head, nn.Linear):
        slots[f"embedding/{names[head]}.weight"] = _own(head, "weight")
    return slots


def _attention(model: Any, *, rank: int, seed: int) -> Slots:
    """A LoRA on every linear layer of the backbone except the head; an existing one is trained further.

    Modules whose code reads the weights of its layers itself, such as Mamba's, get none.
    """
    head = model.get_output_embeddings()
    slots: Slots = {}
    opaque = [name for name, module in model.named_modules() if type(module).__name__ in OPAQUE]
    found = [
        (name, module)
        for name, module in _backbone_modules(model)
        if module is not head
        and isinstance(module, nn.Linear | LoraLinear)
        and not name.endswith(".base")
        and not any(name.startswith(f"{each}.") for each in opaque)
    ]
    for name, module in found:
        if isinstance(module, nn.Linear):
            module = wrap_linear(model, name, *_fresh(module, rank, seed=tensor_seed(seed, (), name)))
        slots |= _lora_slots(module, f"attention/{name}")
    return slots


def _adapters(places: list[ExpertPlace], *, rank: int, seed: int) -> Slots:
    """A LoRA on every linear layer of every expert, each with its own values; an existing one is trained further."""
    slots: Slots = {}
    for place in places:
        linears = {name: part for name, part in place.module.named_modules() if isinstance(part, nn.Linear)}
        new = {
            name: _fresh(linear, rank, seed=tensor_seed(seed, place.node.path, f"{place.layer}/{name}"))
            for name, linear in linears.items()
            if not name.endswith(".base")
        }
        expert = with_adapter(place.module, new)
        place.put(expert)
        for name, part in expert.named_modules():
            if isinstance(part, LoraLinear):
                dense = place.dense_name(f"{name}.weight").removesuffix(".weight")
                slots |= _lora_slots(part, f"adapter/{place.path}/{dense}")
    return slots


def _fresh(linear: nn.Linear, rank: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A random A of deviation 1/sqrt(I) and a zero B: outputs are unchanged at first, but the experts' A differ."""
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
    return a_RI, torch.zeros(linear.out_features, rank), 1.0


def _lora_slots(module: LoraLinear, name: str) -> Slots:
    """A and B, with the scale multiplied into B, so that no alpha is needed."""
    with torch.no_grad():
        module.b = nn.Parameter(module.b.float() * module.scale)
    module.scale = 1.0
    return {f"{name}/{key}": _own(module, key) for key in ("a", "b")}


def _experts(places: list[ExpertPlace]) -> Slots:
    """Every expert's FFN with its own weights; experts of one source shared them until now."""
    slots: Slots = {}
    for place in places:
        expert = copy.deepcopy(place.module)
        place.put(expert)
        for name, part in list(expert.named_modules()):
            if isinstance(part, LoraLinear):
                continue
            for key in [key for key, _ in part.named_parameters(recurse=False)]:
                suffix = ".".join(word for word in (*name.split("."), key) if word != "base" and word)
                slots[f"expert/{place.path}/{place.dense_name(suffix)}"] = _own(part, key)
    return slots
