"""Measures an MoE on held-out text: loss per domain, load and entropy per layer.

Shape suffixes: B blocks in a batch, T tokens, E experts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn

from frankenmoe.moe.trace import LayerTrace, concat, load, record
from frankenmoe.train import losses
from frankenmoe.train.data import Domain, as_tensors
from frankenmoe.train.head import summed

BATCH = 8


@dataclass(frozen=True)
class Look:
    """One measurement: nats per token of each domain, and per layer each expert's load and the router's entropy.

    `load[layer][expert]` is a share of all assignments. `entropy[layer]` is the entropy of the router's softmax over
    all experts, in nats, averaged over tokens (0: certain, log E: uniform). `largest` is the largest load of all.
    """

    step: int
    loss: dict[str, float]
    load: list[list[float]]
    entropy: list[float]

    @property
    def mean(self) -> float:
        """Mean loss over domains, unweighted."""
        return fmean(self.loss.values())

    @property
    def largest(self) -> float:
        return max(max(layer) for layer in self.load)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean}


@torch.no_grad()
def look(
    model: Any,
    domains: Sequence[Domain],
    *,
    step: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    head: nn.Module | None,
    on_block: Callable[[int], None] = lambda count: None,
) -> Look:
    """Measures the model as it will be used: evaluation mode, no noise, the MoE's own top-k.

    `head` is that of `train.head.summed`.
    """
    was_training = model.training
    model.eval()
    loss: dict[str, float] = {}
    traces: list[LayerTrace] = []
    for domain in domains:
        total, count = 0.0, 0
        for start in range(0, len(domain.held), BATCH):
            rows = [as_tensors(block) for block in domain.held[start : start + BATCH]]
            ids_BT = torch.stack([row["input_ids"] for row in rows]).to(device)
            labels_T = torch.stack([row["labels"] for row in rows])[:, 1:].flatten().to(device)
            with record(model) as layers, context():
                total += float(summed(model, ids_BT, partial(_next_token, labels_T=labels_T), head=head))
            traces += [trace for trace in layers if not trace.path]
            count += int((labels_T >= 0).sum())
            on_block(len(rows))
        loss[domain.name] = total / count
    model.train(was_training)
    routers = concat(traces).layers
    return Look(step, loss, [load(each).tolist() for each in routers], [_entropy(each) for each in routers])


def _next_token(logits_TV: torch.Tensor, rows: slice, *, labels_T: torch.Tensor) -> torch.Tensor:
    return losses.next_token(logits_TV, labels_T[rows]).sum()


def _entropy(trace: LayerTrace) -> float:
    log_probs_TE = trace.logits_TE.float().log_softmax(dim=-1)
    return float(-(log_probs_TE.exp() * log_probs_TE).sum(dim=-1).mean())
