"""The training loss of one part of a batch: the sum of its terms, each times its coefficient.

Shape suffixes: T tokens, V vocabulary, L layers, E experts, K top-k.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.router import Routing
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train import losses
from frankenmoe.train.head import summed
from frankenmoe.train.routing import seen_routings

Inputs = Mapping[str, torch.Tensor]
"""What `Mixture.batch` returns."""


def part_loss(
    model: nn.Module,
    inputs: Inputs,
    *,
    targets: int,
    settings: TrainSettings,
    blocks: dict[int, MoEBlock],
    context: Callable[[], AbstractContextManager[Any]],
    head: nn.Module | None,
    processes: int,
) -> torch.Tensor:
    """One process's share of the loss; summed over the parts and averaged over processes, it is the loss of the batch.

    `targets` counts the tokens that the whole batch learns. `head` is that of `train.head.summed`.
    """
    with seen_routings(blocks) as routings, context():
        tokens = _token_loss(model, inputs, settings=settings, head=head) * processes / max(1, targets)
    return tokens + _router_loss(routings, inputs, settings=settings, processes=processes) / settings.accumulate


def _token_loss(model: nn.Module, inputs: Inputs, *, settings: TrainSettings, head: nn.Module | None) -> torch.Tensor:
    """The sum over targets of the terms that read the model's predictions."""
    labels_T = inputs["labels"][:, 1:].flatten()
    teacher = [inputs[key][:, :-1].flatten(0, 1) for key in ("teacher", "teacher_ids") if key in inputs]

    def terms(logits_TV: torch.Tensor, rows: slice) -> torch.Tensor:
        total = logits_TV.new_zeros((), dtype=torch.float32)
        if settings.next_token:
            total = total + settings.next_token * losses.next_token(logits_TV, labels_T[rows]).sum()
        if settings.distill and teacher:
            kl_T = losses.distill(logits_TV, *(each[rows] for each in teacher))
            total = total + settings.distill * (kl_T * (labels_T[rows] >= 0)).sum()
        return total

    return summed(model, inputs["input_ids"], terms, head=head)


def _router_loss(
    routings: list[Routing], inputs: Inputs, *, settings: TrainSettings, processes: int
) -> torch.Tensor | float:
    """The mean over layers of the terms that read gate logits."""
    owner_T = inputs["owner"][:, None].expand_as(inputs["input_ids"]).flatten()
    terms: list[torch.Tensor] = []
    if settings.balance:
        shares = zip(routings, _load(routings, processes=processes), strict=True)
        terms += [settings.balance * losses.switch_balance(each.logits_TE, share_E) for each, share_E in shares]
    if settings.domain:
        terms += [settings.domain * losses.domain(each.logits_TE, owner_T) for each in routings]
    if settings.z:
        terms += [settings.z * losses.router_z(each.logits_TE) for each in routings]
    return torch.stack(terms).sum() / len(routings) if terms else 0.0


def _load(routings: list[Routing], *, processes: int) -> list[torch.Tensor]:
    """Each layer's share of choices per expert, counted over all processes: balance is a property of the batch."""
    counts_LE = torch.stack([losses.choice_counts(each.ids_TK, experts=each.logits_TE.shape[1]) for each in routings])
    if processes > 1:
        dist.all_reduce(counts_LE)
    return list(counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1))
