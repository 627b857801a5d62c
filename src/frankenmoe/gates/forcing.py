"""Replaces routers temporarily, such as by one that sends every token to the expert at a path. Reads and sets gates.

Shape suffixes: T tokens, K chosen experts, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.router import Routing
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning.layout import SHARED, RouterPath


class Forced(nn.Module):
    """Takes the place of a router and gives every token the same experts with equal weights."""

    def __init__(self, chosen: Sequence[int], *, experts: int) -> None:
        super().__init__()
        self.chosen = tuple(chosen)
        self.experts = experts

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """The same Routing for every token; its logits are zero."""
        tokens, device = hidden_TD.shape[0], hidden_TD.device
        ids_TK = torch.tensor(self.chosen, device=device).expand(tokens, -1)
        weights_TK = torch.full(ids_TK.shape, 1 / len(self.chosen), device=device)
        return Routing(weights_TK, ids_TK, torch.zeros(tokens, self.experts, device=device))


def block_at(block: MoEBlock, path: RouterPath) -> MoEBlock:
    """The block that chooses among the experts below `path`."""
    for index in path:
        inner = block.experts[index]
        assert isinstance(inner, MoEBlock)
        block = inner
    return block


@contextmanager
def forced(model: nn.Module, path: RouterPath, *, except_for: bool = False) -> Iterator[None]:
    """Within the context every layer uses only the expert at `path`.

    If that expert has experts of its own, all of them are used equally; so do SHARED and () with the outer experts.
    `except_for` uses all siblings of the expert at `path` equally instead, or that expert if it has none.
    """
    with replaced(
        [
            (block, Forced(chosen, experts=len(block.experts)))
            for outer in outer_blocks(model).values()
            for block, chosen in _choices(outer, path, except_for)
        ]
    ):
        yield


def _choices(block: MoEBlock, path: RouterPath, except_for: bool) -> Iterator[tuple[MoEBlock, list[int]]]:
    everything = range(len(block.experts))
    if not path or path == SHARED:
        chosen = list(everything)
    elif except_for and len(path) == 1:
        chosen = [index for index in everything if index != path[0]] or [path[0]]
    else:
        chosen = [path[0]]
    yield block, chosen
    rest = path[1:] if len(path) > 1 else ()
    for index in chosen:
        inner = block.experts[index]
        if isinstance(inner, MoEBlock):
            yield from _choices(inner, rest, except_for and bool(rest))


@contextmanager
def replaced(routers: Iterable[tuple[MoEBlock, nn.Module]]) -> Iterator[None]:
    """Within the context, every block has the router beside it."""
    before = []
    try:
        for block, router in routers:
            before.append((block, block.router))
            block.router = router  # type: ignore[assignment]
        yield
    finally:
        for block, router in before:
            block.router = router


def set_gates(model: nn.Module, rows: Mapping[RouterPath, Sequence[torch.Tensor]]) -> None:
    """Sets the gates [E, D], one per layer, of the router at each path; at SHARED those of the shared experts [1, D].

    Gates get the type of the gate that was there, which is the type on disk. Parameters are replaced, not overwritten,
    because they may be mapped pages of a file.
    """
    for path, gates in rows.items():
        for outer, gate_ED in zip(outer_blocks(model).values(), gates, strict=True):
            if path == SHARED:
                assert outer.shared_gate is not None
                outer.shared_gate.weight = _like(gate_ED, outer.shared_gate.weight)
            else:
                router = block_at(outer, path).router
                router.weight = _like(gate_ED, router.weight)


def gates_of(model: nn.Module, paths: Sequence[RouterPath]) -> dict[RouterPath, list[torch.Tensor]]:
    """The gates at `paths`, in the form that `set_gates` takes."""
    found = {}
    for path in paths:
        shared = path == SHARED
        found[path] = [
            (outer.shared_gate if shared else block_at(outer, path).router).weight.detach()  # type: ignore[union-attr]
            for outer in outer_blocks(model).values()
        ]
    return found


def _like(gate_ED: torch.Tensor, old: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(gate_ED.to(dtype=old.dtype, device=old.device), requires_grad=False)
