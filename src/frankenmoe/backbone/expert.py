"""Heals one expert: refits its down projections, layer by layer, so that the MoE's states follow its parent's.

Every token of the expert's text goes to this expert alone. Shape suffixes: N blocks, B blocks of a batch, T tokens of a
block, I inputs, O outputs of a down projection.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from frankenmoe.backbone.heal import Moments, Refit, low_rank, refit
from frankenmoe.backbone.measure import Losses, block_losses
from frankenmoe.backbone.stream import Stream
from frankenmoe.data.blocks import Block
from frankenmoe.gates.fitted import computing_dtype
from frankenmoe.moe.bylayer import placed
from frankenmoe.moe.dense import load_source, torch_dtype
from frankenmoe.moe.device import CPU, Weights, check_room
from frankenmoe.moe.load import MoE, load_parts
from frankenmoe.moe.processes import from_main, world
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.planning.healing import down_suffix
from frankenmoe.planning.parts import parts_of_plan

Advance = Callable[[int], None]
STEPS = (0.25, 0.5, 0.75, 1.0)
"""The shares of the change that are tried on held-out text."""


@dataclass(frozen=True)
class Change:
    """The change of one down projection [O, I], and its factors B [O, R], A [R, I] if it is of low rank."""

    whole_OI: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None
    ridge: float
    left: float


@dataclass(frozen=True)
class HealedExpert:
    """The changes of an expert's down projections, one per layer, and what they do to the held-out loss.

    `step` is the share of the changes that is kept; 0 if nothing surely lowers the loss. Losses are in nats per token,
    with this expert forced in every layer; `parent` is the loss of the parent itself. `noise` is the standard error of
    the fall of the loss: of that with the kept share, or of the lowest one if none is kept.
    """

    changes: tuple[Change, ...]
    step: float
    parent: float
    before: float
    after: float
    noise: float


def alone(plan: Plan, leaf: ExpertNode, *, dtype: torch.dtype | None = None) -> MoE:
    """The MoE with one expert, adapters folded in: what a plan computes if every token goes to `leaf`."""
    rows = {layer: {suffix: leaf.folded(layer, suffix) for suffix in row} for layer, row in leaf.ffn.items()}
    node = replace(leaf, path=(0,), ffn=rows, loras={layer: {} for layer in rows})
    parts = replace(parts_of_plan(plan), nodes=(node,), top_k=1)
    shapes = dict(plan.routers)
    shapes.update(dict.fromkeys(parts.router_names(()).values(), (1, plan.hidden)))
    gates = {name: torch.zeros(shape, dtype=torch_dtype(plan.dtype)) for name, shape in shapes.items()}
    return load_parts(parts, gates, dtype=dtype)


def heal_expert(
    plan: Plan,
    leaf: ExpertNode,
    *,
    kept: Sequence[Block],
    held: Sequence[Block],
    ridges: Sequence[float],
    rank: int | None,
    device: torch.device = CPU,
    dtype: str | None = None,
    on_tokens: Advance,
) -> HealedExpert:
    """Heals a leaf whose down projections are known, on blocks of equal length.

    The processes of a launcher share the blocks: all of them call this, and get the same changes.
    `held` choose the ridge of every layer and the share that is kept. Raises PlanError for a family whose layers
    cannot be healed, and if not even a layer fits on `device` in `dtype` (by default `computing_dtype`).
    """
    assert leaf.source is not None
    size = 2 * _bytes(plan, leaf)
    name = dtype or computing_dtype(plan, device, stored=size)
    kind = getattr(torch, name) if name else None
    check_room(Weights(size, torch_dtype(plan.dtype)), CPU, dtype=kind)
    parent = placed(load_source(leaf.source, stored=plan.dtype, dtype=kind), device)
    own = alone(plan, leaf, dtype=kind)
    placed(own.model, device)
    downs = _downs(own, leaf)

    def measured(model: PreTrainedModel) -> Losses:
        found = Losses({leaf.name: block_losses(model, held, together=world() > 1)})
        on_tokens(sum(len(block.ids) for block in held))
        return found

    losses, goal = {0.0: measured(own.model)}, measured(parent)
    changes = tuple(_sweep(parent, own, downs, kept, held, ridges=ridges, rank=rank, on_tokens=on_tokens))
    for step in from_main(STEPS if any(change.left < 1 for change in changes) else ()):
        with _changed(list(downs.values()), [step * change.whole_OI for change in changes]):
            losses[step] = measured(own.model)
    step = from_main(surely_best(losses))
    lowest = min(losses, key=lambda each: losses[each].mean)
    noise = losses[step or lowest].noise(losses[0.0])
    return HealedExpert(changes, step, goal.mean, losses[0.0].mean, losses[step].mean, noise)


def surely_best(losses: Mapping[float, Losses]) -> float:
    """The smallest share of the changes whose loss is at most one standard error above the lowest.

    So nothing is changed (share 0) unless that lowers the loss by more than one standard error, paired by block.
    """
    lowest = losses[min(losses, key=lambda step: losses[step].mean)]
    return min(step for step, each in losses.items() if each.behind(lowest) <= each.noise(lowest))


def _bytes(plan: Plan, leaf: ExpertNode) -> int:
    """The bytes of the MoE with one expert, which are those of its parent."""
    return sum(write.nbytes for write in (*plan.backbone, *leaf.folded_writes()))


def cost(kept: Sequence[Block], held: Sequence[Block]) -> int:
    """The tokens that healing one expert runs through a model: all text twice, the held-out text once per loss."""
    length = len(held[0].ids)
    return length * (2 * (len(kept) + len(held)) + (2 + len(STEPS)) * len(held))


def _downs(moe: MoE, leaf: ExpertNode) -> dict[int, nn.Module]:
    """Layer -> the down projection of its only expert."""
    found = {}
    for layer, block in outer_blocks(moe.model).items():
        suffix = down_suffix(leaf, layer)
        assert suffix is not None
        found[layer] = block.experts[0].get_submodule(suffix.removesuffix(".weight"))
    return found


def _sweep(
    parent: PreTrainedModel,
    own: MoE,
    downs: Mapping[int, nn.Module],
    kept: Sequence[Block],
    held: Sequence[Block],
    *,
    ridges: Sequence[float],
    rank: int | None,
    on_tokens: Advance,
) -> Iterator[Change]:
    """The change of every layer from the first on; a layer is refitted after all earlier ones have changed."""
    ids_NT = torch.tensor([block.ids for block in (*kept, *held)])
    leading, following = (Stream(model, ids_NT, together=world() > 1) for model in (parent, own.model))
    gain = following.gain(*next(iter(outer_blocks(own.model).items())))
    tokens, ridge = 2 * ids_NT.numel(), None
    for layer in leading.layers:
        leading.advance(layer)
        if layer not in downs:
            following.advance(layer)
            continue
        down = downs[layer]
        outs = list(following.run(layer, observed=down))
        moments = _moments(down, leading, outs, kept=len(kept), gain=gain)
        found = refit(*moments, ridges=ridges, first=ridge)
        change, ridge = _change(found, moments[0], rank=rank), found.ridge
        following.states = [
            (out_BTO.float() + gain * inputs_BTI.float() @ change.whole_OI.T).to(out_BTO.dtype)
            for out_BTO, inputs_BTI in outs
        ]
        yield change
        done = list(downs).index(layer)
        on_tokens(tokens * (done + 1) // len(downs) - tokens * done // len(downs))


def _moments(
    down: nn.Module,
    leading: Stream,
    outs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    kept: int,
    gain: float,
) -> tuple[Moments, Moments]:
    """The moments of the first `kept` blocks, and of the others, of all processes. The targets are `leading`'s states.

    A token weighs 1 / |target|^2, so all count alike. The first token of a block weighs nothing: its states are many
    times larger than any other's, and every model has learnt to ignore them.
    """
    weight = weight_of(down)
    outputs, inputs = weight.shape if isinstance(down, nn.Linear) else weight.T.shape
    found = (Moments(inputs, outputs, device=leading.device), Moments(inputs, outputs, device=leading.device))
    for start, target_BTO, (out_BTO, inputs_BTI) in zip(leading.starts, leading.states, outs, strict=True):
        target_BTO = target_BTO.float()
        error_BTO = (target_BTO - out_BTO.float()) / gain
        weight_BT = 1 / target_BTO.pow(2).sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        weight_BT[:, 0] = 0
        cut = min(max(kept - start, 0), len(target_BTO))
        for moments, rows in zip(found, (slice(0, cut), slice(cut, None)), strict=True):
            moments.add(inputs_BTI[rows].flatten(0, 1), error_BTO[rows].flatten(0, 1), weight_BT[rows].flatten())
    for moments in found:
        moments.all_reduce()
    return found


def _change(found: Refit, kept: Moments, *, rank: int | None) -> Change:
    if rank is None or found.left == 1:
        return Change(found.change_OI, None, found.ridge, found.left)
    a_RI, b_OR = low_rank(found.change_OI, kept.gram_II, rank=rank)
    return Change(b_OR @ a_RI, (b_OR, a_RI), found.ridge, found.left)


@contextmanager
def _changed(downs: Sequence[nn.Module], changes_OI: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within the context the down projections have these changes. Their own weights may be mapped pages of a file."""
    before = [weight_of(down) for down in downs]
    try:
        for down, weight, change_OI in zip(downs, before, changes_OI, strict=True):
            down.weight = nn.Parameter(changed(down, weight, change_OI), requires_grad=False)
        yield
    finally:
        for down, weight in zip(downs, before, strict=True):
            down.weight = weight


def weight_of(down: nn.Module) -> torch.Tensor:
    """The weight of a linear layer of any class."""
    found = down.weight
    assert isinstance(found, torch.Tensor)
    return found


def changed(down: nn.Module, weight: torch.Tensor, change_OI: torch.Tensor) -> torch.Tensor:
    """A weight plus a change, in the weight's type. Conv1D, as in GPT-2, stores its weight as [I, O]."""
    change = change_OI if isinstance(down, nn.Linear) else change_OI.T
    return (weight.float() + change.to(weight.device)).to(weight.dtype)
