"""Compares the outputs of an MoE with those of its base, and with its own if other experts are chosen.

Shape suffixes: T tokens, V vocabulary, K top-k.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frankenmoe.audit.stats import others
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import load_source
from frankenmoe.moe.device import place
from frankenmoe.moe.load import MoE
from frankenmoe.moe.router import Routing
from frankenmoe.moe.trace import blocks
from frankenmoe.planning import Plan

ROUNDINGS = 64  # two equal models may differ by this many units in the last place of the largest logit


@dataclass(frozen=True)
class Change:
    """How much outputs changed: mean KL divergence (nats per token), share of tokens whose most likely next token
    changed, largest difference of a logit, and the largest logit itself."""

    divergence: float
    changed: float
    largest: float
    logit: float

    def within_rounding(self, dtype: torch.dtype) -> bool:
        """Whether rounding in `dtype` explains the difference."""
        return self.largest <= ROUNDINGS * torch.finfo(dtype).eps * max(self.logit, 1.0)


@torch.inference_mode()
def swapped(moe: MoE, probes: Sequence[Sequence[int]]) -> tuple[dict[int, float], Change | None]:
    """(layer -> relative change of the block's output, change of the model's output) with the next best experts chosen.

    `probes` are sequences of token ids, each read alone. A layer's change is |other - own| / |own|, averaged over
    tokens, on the input that the layer really gets. For the model's change all layers are swapped at once. Weights stay
    with the rank, so only the experts differ. Layers that choose every expert are left out; if no layer is left, the
    change is None.
    """
    outer = [(layer, block) for layer, path, block in blocks(moe.model) if not path]
    outer = [(layer, block) for layer, block in outer if block.router.top_k < block.router.weight.shape[0]]
    if not outer:
        return {}, None
    moved: dict[int, list[torch.Tensor]] = {layer: [] for layer, _ in outer}
    changes = []
    for probe in probes:
        with ExitStack() as hooks:
            for layer, block in outer:
                hooks.callback(block.register_forward_hook(_measure(moved[layer])).remove)
            own_TV = _logits(moe.model, probe)
        with ExitStack() as hooks:
            for _, block in outer:
                hooks.enter_context(_others_chosen(block))
            changes.append((change(own_TV, _logits(moe.model, probe)), len(probe)))
    return {layer: float(torch.cat(parts).mean()) for layer, parts in moved.items()}, joined(changes)


@torch.inference_mode()
def against_base(moe: MoE, plan: Plan, probes: Sequence[Sequence[int]]) -> Change:
    """Compares the MoE's output with that of its dense base, computed in the MoE's type."""
    dtype = next(moe.model.parameters()).dtype
    dense = place(load_source(plan.base, stored=plan.dtype, dtype=dtype), moe.model.device)
    return joined([(change(_logits(dense, probe), _logits(moe.model, probe)), len(probe)) for probe in probes])


def joined(changes: Sequence[tuple[Change, int]]) -> Change:
    """Several changes as one; means are weighted by each one's number of tokens."""
    tokens = sum(count for _, count in changes)
    return Change(
        divergence=sum(each.divergence * count for each, count in changes) / tokens,
        changed=sum(each.changed * count for each, count in changes) / tokens,
        largest=max(each.largest for each, _ in changes),
        logit=max(each.logit for each, _ in changes),
    )


def _logits(model: Any, probe: Sequence[int]) -> torch.Tensor:
    ids_1T = torch.tensor([list(probe)], device=model.device)
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0].float().cpu()
    return logits_TV


def change(own_TV: torch.Tensor, other_TV: torch.Tensor) -> Change:
    """Compares two models' logits on the same tokens: KL(own || other) and the other measures."""
    own_log_TV, other_log_TV = own_TV.log_softmax(dim=-1), other_TV.log_softmax(dim=-1)
    divergence_T = (own_log_TV.exp() * (own_log_TV - other_log_TV)).sum(dim=-1)
    return Change(
        divergence=max(0.0, float(divergence_T.mean())),
        changed=float((own_TV.argmax(dim=-1) != other_TV.argmax(dim=-1)).float().mean()),
        largest=float((own_TV - other_TV).abs().max()),
        logit=float(own_TV.abs().max()),
    )


def _measure(moved: list[torch.Tensor]) -> Any:
    busy = False

    def hook(block: nn.Module, inputs: tuple[torch.Tensor], own: torch.Tensor) -> None:
        nonlocal busy
        if busy:  # the second run of the block, with other experts
            return
        assert isinstance(block, MoEBlock)
        busy = True
        with _others_chosen(block):
            other = block(inputs[0])
        busy = False
        own_TD, other_TD = (out.reshape(-1, out.shape[-1]).float() for out in (own, other))
        length_T = torch.linalg.vector_norm(own_TD, dim=-1).clamp(min=1e-12)
        moved.append((torch.linalg.vector_norm(other_TD - own_TD, dim=-1) / length_T).cpu())

    return hook


@contextmanager
def _others_chosen(block: MoEBlock) -> Iterator[None]:
    def swap(_module: nn.Module, _inputs: object, routing: Routing) -> Routing:
        ranked_TE = routing.logits_TE.argsort(dim=-1, descending=True, stable=True)
        return routing._replace(ids_TK=others(ranked_TE, top_k=block.router.top_k))

    handle = block.capacity.register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()
