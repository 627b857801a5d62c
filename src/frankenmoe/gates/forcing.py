"""Takes routers out of the way: for a while every token goes where a path says; knows nothing of text or fitting.

Shape suffixes: T tokens, K chosen experts, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import mlp_modules
from frankenmoe.moe.router import Routing
from frankenmoe.planning.layout import SHARED

Path = tuple[int, ...]


class Forced(nn.Module):
    """Stands where a router stood and gives every token the same experts with equal weights."""

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


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The outer block of every layer, in order."""
    return [mlp for _, mlp in mlp_modules(model).values() if isinstance(mlp, MoEBlock)]


def block_at(block: MoEBlock, path: Path) -> MoEBlock:
    """The block that chooses among the experts below `path`."""
    for index in path:
        inner = block.experts[index]
        assert isinstance(inner, MoEBlock)
        block = inner
    return block


@contextmanager
def forced(model: nn.Module, path: Path, *, except_for: bool = False) -> Iterator[None]:
    """Within the context every layer uses the expert at `path` alone.

    A path that ends at experts of its own uses all of them equally, as SHARED and () do with the outer ones;
    `except_for` uses equally all experts beside the one at `path`, or, if it has no sibling, that one.
    """
    with _replaced(
        (block, chosen) for outer in moe_blocks(model) for block, chosen in _choices(outer, path, except_for)
    ):
        yield


def _choices(block: MoEBlock, path: Path, except_for: bool) -> Iterator[tuple[MoEBlock, list[int]]]:
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
def _replaced(choices: Iterator[tuple[MoEBlock, list[int]]]) -> Iterator[None]:
    before = []
    try:
        for block, chosen in list(choices):
            before.append((block, block.router))
            block.router = Forced(chosen, experts=len(block.experts))  # type: ignore[assignment]
        yield
    finally:
        for block, router in before:
            block.router = router


def set_gates(model: nn.Module, rows: Mapping[Path, Sequence[torch.Tensor]]) -> None:
    """Puts gates [E, D], one per layer, at each router's path; those of SHARED [1, D] at the shared experts.

    They are rounded to the type of the gate that was there, as they will be on disk. Parameters are replaced, not
    written into: they may be mapped pages of a file.
    """
    for path, gates in rows.items():
        for outer, gate_ED in zip(moe_blocks(model), gates, strict=True):
            if path == SHARED:
                assert outer.shared_gate is not None
                outer.shared_gate.weight = _like(gate_ED, outer.shared_gate.weight)
            else:
                router = block_at(outer, path).router
                router.weight = _like(gate_ED, router.weight)


def gates_of(model: nn.Module, paths: Sequence[Path]) -> dict[Path, list[torch.Tensor]]:
    """The gates that `set_gates` would put back."""
    found = {}
    for path in paths:
        shared = path == SHARED
        found[path] = [
            (outer.shared_gate if shared else block_at(outer, path).router).weight.detach()  # type: ignore[union-attr]
            for outer in moe_blocks(model)
        ]
    return found


def _like(gate_ED: torch.Tensor, old: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(gate_ED.to(dtype=old.dtype, device=old.device), requires_grad=False)
