"""Computes losses from the model's head a few tokens at a time, so that all logits are never in memory together.

Shape suffixes: B blocks, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

NUMBERS = 1 << 22  # logits at a time
FEWEST = 64  # tokens at a time; with fewer, reading the head's weights takes longer than multiplying

TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(logits_TV, their slice of all rows) -> the sum of their losses."""


def is_direct(model: Any, *, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> bool:
    """Whether the logits are the head's output as it is, not scaled, capped or cut afterwards. Runs one token.

    `context` is the precision that the model computes in on its present device.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    made: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: made.append(output))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), context():
            ids_BT = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    return len(made) == 1 and logits_BTV is made[0]


def summed(
    model: nn.Module, ids_BT: torch.Tensor, loss: TokenLoss, *, head: nn.Module | None, numbers: int = NUMBERS
) -> torch.Tensor:
    """The sum of `loss` over the logits of a causal language model, after every token except a block's last.

    If `is_direct`, pass the model's own `head` (also if `model` is a wrapper): about `numbers` logits are then in
    memory at a time, and are differentiated at once. With None, all logits are computed together.
    """
    if head is None:
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        return loss(logits_BTV.flatten(0, 1), slice(None))

    weight = head.weight
    assert isinstance(weight, torch.Tensor)

    def instead(hidden_BTD: torch.Tensor) -> torch.Tensor:
        hidden_TD = hidden_BTD[:, :-1].flatten(0, 1)
        step = max(FEWEST, numbers // max(1, weight.shape[0]))
        parts = [slice(start, start + step) for start in range(0, len(hidden_TD), step)]
        if torch.is_grad_enabled():
            learning = [parameter for parameter in head.parameters() if parameter.requires_grad]
            total: torch.Tensor = _Summed.apply(own, loss, parts, hidden_TD, *learning)  # type: ignore[no-untyped-call]
        else:
            total = torch.stack([loss(own(hidden_TD[part]), part) for part in parts]).sum()
        return total.expand(*hidden_BTD.shape[:2], 1)

    with _replaced(head, instead) as own:
        # taken from the model's output, so that wrappers (DDP) see what backward goes through
        total: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits[0, 0, 0]
    return total


@contextmanager
def _replaced(head: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[Callable[..., torch.Tensor]]:
    """Replaces the forward of `head` within the context; yields the original."""
    before, own = head.forward, "forward" in vars(head)
    head.forward = forward
    try:
        yield before
    finally:
        if own:
            head.forward = before
        else:
            del head.forward


class _Summed(torch.autograd.Function):
    """Sums a loss over logits part by part, and differentiates each part in the forward pass, as a sum allows."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[..., torch.Tensor],
        loss: TokenLoss,
        parts: Sequence[slice],
        hidden_TD: torch.Tensor,
        *learning: torch.Tensor,
    ) -> torch.Tensor:
        totals: list[torch.Tensor] = []
        learns = False
        d_hidden_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[3] else None
        d_learning = [torch.zeros_like(parameter) for parameter in learning]
        for part in parts:
            with torch.enable_grad():
                rows_TD = hidden_TD[part].detach().requires_grad_(d_hidden_TD is not None)
                total = loss(head(rows_TD), part)
            totals.append(total.detach())
            learns |= total.requires_grad
            wanted = [*([rows_TD] if d_hidden_TD is not None else []), *learning]
            found = list(torch.autograd.grad(total, wanted)) if total.requires_grad else []
            if found and d_hidden_TD is not None:
                d_hidden_TD[part] = found.pop(0)
            for whole, each in zip(d_learning, found, strict=bool(found)):
                whole += each
        ctx.save_for_backward(d_hidden_TD, *d_learning)
        summed_up = torch.stack(totals).sum()
        if not learns:
            ctx.mark_non_differentiable(summed_up)
        return summed_up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> Any:
        return None, None, None, *(None if each is None else each * d_total for each in ctx.saved_tensors)
