"""Runs a model that its device cannot hold: the weights of each layer are brought there while the layer computes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from frankenmoe.errors import PlanError
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import layer_modules
from frankenmoe.moe.device import amount, free_memory, place, usable
from frankenmoe.moe.router import Router

Model = TypeVar("Model", bound=nn.Module)
Spot = tuple[dict[str, Any], str, torch.Tensor]
"""A module's parameters or buffers, the name of one of them, and that one."""


def placed(model: Model, device: torch.device) -> Model:
    """The model on a device if that can hold it, else with its layers left where they are, mostly mapped from files.

    What is outside of the layers, and every router, then moves to the device. The weights of a layer are copied there
    for each of its calls, so a call takes as long as the copying. Raises PlanError if the largest layer does not fit
    beside what moves.
    """
    if device.type == "cpu":
        return model
    room = usable(free_memory(device))
    if _bytes(_spots(model.modules())) <= room:
        return place(model, device)
    layers = list(layer_modules(model).values())
    inside = {id(part) for layer in layers for part in _staying(layer)}
    outside = [module for module in model.modules() if id(module) not in inside]
    needed = _bytes(_spots(outside)) + max((_bytes(_spots(_staying(layer))) for layer in layers), default=0)
    if needed > room:
        raise PlanError(
            f"{device} has {amount(room)} of memory free, but one layer with the embeddings needs {amount(needed)}",
            hint="use --device cpu, which keeps weights mapped from their files",
        )
    _move(_spots(outside), device)
    for layer in layers:
        layer.forward = _borrowing(layer, layer.forward, device)
    for module in model.modules():
        if isinstance(module, MoEBlock):
            module.keep_apart()
    return model


def _staying(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a layer whose weights stay outside of the device: all but the routers."""
    routers = {id(part) for module in layer.modules() if isinstance(module, Router) for part in module.modules()}
    return (module for module in layer.modules() if id(module) not in routers)


def _borrowing(layer: nn.Module, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A layer's `forward` with its weights on a device."""

    def borrowing(*args: Any, **kwargs: Any) -> Any:
        with _borrowed(layer, device):
            return forward(*args, **kwargs)

    return borrowing


@contextmanager
def _borrowed(layer: nn.Module, device: torch.device) -> Iterator[None]:
    spots = _spots(_staying(layer))
    try:
        _move(spots, device)
        yield
    finally:
        for owner, name, tensor in spots:
            owner[name] = tensor


def _spots(modules: Iterable[nn.Module]) -> list[Spot]:
    return [
        (owner, name, tensor)
        for module in modules
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    ]


def _move(spots: Iterable[Spot], device: torch.device) -> None:
    """Replaces tensors by copies on a device; a tensor in several places stays one."""
    moved: dict[int, torch.Tensor] = {}
    for owner, name, tensor in spots:
        if id(tensor) not in moved:
            there = tensor.to(device)
            kept = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if kept else there
        owner[name] = moved[id(tensor)]


def _bytes(spots: Iterable[Spot]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for _, _, tensor in spots}.values())
