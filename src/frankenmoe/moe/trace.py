"""Records what every router of a model decided."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import mlp_modules
from frankenmoe.moe.experts import DROPPED
from frankenmoe.moe.router import Routing

# T tokens, E experts, K top-k


@dataclass(frozen=True)
class LayerTrace:
    """What one router decided for the T tokens it saw. Batch and position are flattened, tensors are detached.

    `path` is "" for a layer's outer router, "2" for the router nested in its expert 2, "2.0" for one level deeper. Row
    n of path "2" is the n-th token of path "" that has 2 among its ids. A dropped assignment has the id -1 and keeps
    its weight.
    """

    layer: int
    path: str
    experts: int
    weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    logits_TE: torch.Tensor


@dataclass(frozen=True)
class RoutingTrace:
    """The traces of a model, one per router."""

    layers: tuple[LayerTrace, ...]

    def layer(self, layer: int, *, path: str = "") -> LayerTrace:
        """The trace of one router. Raises ArtifactError if there is none."""
        for trace in self.layers:
            if (trace.layer, trace.path) == (layer, path):
                return trace
        traced = ", ".join(sorted({str(trace.layer) for trace in self.layers}, key=int)) or "none"
        where = f"layer {layer}" + (f", path {path!r}" if path else "")
        raise ArtifactError(
            f"the trace has no router at {where}, found layers {traced}",
            hint="a nested router is traced only if a token reached it" if path else "layers count from 0",
        )


Sink = Callable[[LayerTrace, torch.Tensor], None]


@contextmanager
def record(model: nn.Module) -> Iterator[list[LayerTrace]]:
    """Within the context, every forward appends one LayerTrace per router that ran, in the order they ran.

    Layers are the MoEBlocks whose name in `model` has an index ("model.layers.3.mlp"); other blocks are ignored.
    Raises ArtifactError if there is none, or if one block is in two places: its traces could not be distinguished.
    """
    traces: list[LayerTrace] = []
    with stream(model, lambda trace, _: traces.append(trace)):
        yield traces


@contextmanager
def stream(model: nn.Module, sink: Sink) -> Iterator[None]:
    """Within the context, calls `sink(trace, hidden_TD)` for every router that ran. `hidden_TD` is the router's input.

    Keeps nothing, so memory does not grow with the text. Records the same routers as `record`, and raises the same
    errors.
    """
    with ExitStack() as hooks:
        for layer, path, block in blocks(model):
            read, decided = _hooks(sink, layer, path)
            hooks.callback(block.router.register_forward_pre_hook(read).remove)
            hooks.callback(block.capacity.register_forward_hook(decided).remove)
        yield


def concat(traces: Iterable[LayerTrace]) -> RoutingTrace:
    """Joins successive forwards along T: one LayerTrace per router, in the order in which routers first ran."""
    by_router: dict[tuple[int, str], list[LayerTrace]] = {}
    for trace in traces:
        by_router.setdefault((trace.layer, trace.path), []).append(trace)
    return RoutingTrace(tuple(_join(parts) for parts in by_router.values()))


def load(trace: LayerTrace) -> torch.Tensor:
    """load_E: each expert's share of the kept assignments. Sums to 1, or is all zero if none was kept."""
    kept = trace.ids_TK[trace.ids_TK != DROPPED]
    counts_E = torch.bincount(kept, minlength=trace.experts)
    return counts_E / counts_E.sum().clamp(min=1)


def outer_blocks(model: nn.Module) -> dict[int, MoEBlock]:
    """Layer -> its outer block, in order."""
    return {layer: mlp for layer, (_, mlp) in mlp_modules(model).items() if isinstance(mlp, MoEBlock)}


def blocks(model: nn.Module) -> list[tuple[int, str, MoEBlock]]:
    """Every block with its layer and path, outer blocks before nested ones. Raises the same errors as `record`."""
    named = {name: part for name, part in model.named_modules(remove_duplicate=False) if isinstance(part, MoEBlock)}
    places = [(*place, block) for name, block in named.items() if (place := _place(name, outer=_outer(name, named)))]
    if not places:
        raise ArtifactError(
            f"a {type(model).__name__} has no layer with an MoEBlock to trace",
            hint="trace the model that load() returns",
        )
    if len({id(block) for *_, block in places}) < len(places):
        raise ArtifactError(
            f"a {type(model).__name__} has one MoEBlock in two places, expected a block of its own in each",
            hint="share the experts inside a block, not the block itself",
        )
    return places


def _outer(name: str, blocks: Iterable[str]) -> str:
    """The name of the outermost block that contains the block `name`, or is that block."""
    return next(block for block in blocks if name == block or name.startswith(f"{block}." if block else ""))


def _place(name: str, *, outer: str) -> tuple[int, str] | None:
    indices = [part for part in outer.split(".") if part.isdecimal()]
    if not indices:
        return None
    inner = name.removeprefix(outer).split(".")
    return int(indices[-1]), ".".join(part for part in inner if part not in ("", "experts"))


def _hooks(sink: Sink, layer: int, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook that keeps a router's input, and one that gives it with the block's final routing to the sink."""
    read: list[torch.Tensor] = []

    def before(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        read[:] = inputs

    def after(_module: nn.Module, _inputs: object, routing: Routing) -> None:
        weights_TK, ids_TK, logits_TE = (tensor.detach() for tensor in routing)
        sink(LayerTrace(layer, path, logits_TE.shape[1], weights_TK, ids_TK, logits_TE), read.pop().detach())

    return before, after


def _join(parts: list[LayerTrace]) -> LayerTrace:
    first = parts[0]
    return LayerTrace(
        first.layer,
        first.path,
        first.experts,
        torch.cat([part.weights_TK for part in parts]),
        torch.cat([part.ids_TK for part in parts]),
        torch.cat([part.logits_TE for part in parts]),
    )
