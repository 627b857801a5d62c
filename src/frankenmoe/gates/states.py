"""What routers really read: the input of every MoE block, token by token, over any model whose `mlp` is one of ours.

Does not know how tokens are routed while it watches, nor what becomes of the states.
Shape suffixes: B blocks in a batch, T tokens, N real tokens of a batch, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.gates.forcing import moe_blocks

BATCH_TOKENS = 2048
OnStates = Callable[[int, torch.Tensor], None]
"""Layer, states_ND: hears of every batch once per layer."""
Advance = Callable[[int], None]
"""Hears how many tokens more are done."""


def silent(tokens: int) -> None:
    """Nobody listens."""


@torch.no_grad()
def watch_inputs(
    model: PreTrainedModel, blocks: Sequence[Block], on_states: OnStates, *, on_tokens: Advance = silent
) -> None:
    """Runs `blocks` and shows every layer's router input, [N, D] in float32; padding is never among it.

    Batches are padded on the right: with causal attention no real token sees the padding, so its state is the same
    alone and in company.
    """
    decoder = model.get_decoder()
    for batch in batches(blocks):
        ids_BT, mask_BT = padded(batch)
        with ExitStack() as hooks:
            for layer, moe_block in enumerate(moe_blocks(model)):
                hooks.callback(moe_block.register_forward_pre_hook(_listener(layer, mask_BT, on_states)).remove)
            decoder(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        on_tokens(sum(len(block.ids) for block in batch))


def _listener(layer: int, mask_BT: torch.Tensor, on_states: OnStates) -> Callable[[nn.Module, object], None]:
    def listen(_module: nn.Module, inputs: object) -> None:
        assert isinstance(inputs, tuple)
        hidden = inputs[0]
        on_states(layer, hidden.reshape(-1, hidden.shape[-1])[mask_BT.reshape(-1)].float())

    return listen


@torch.no_grad()
def mean_loss(model: PreTrainedModel, blocks: Sequence[Block], *, on_tokens: Advance = silent) -> float:
    """Nats per learnt token over `blocks`; NaN where none is learnt."""
    total, count = 0.0, 0
    for batch in batches(blocks):
        ids_BT, mask_BT = padded(batch)
        learn_BT = torch.zeros_like(mask_BT)
        for row, block in enumerate(batch):
            learn_BT[row, : len(block.ids)] = torch.tensor(block.learn)
        logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        wanted = learn_BT[:, 1:]
        losses = functional.cross_entropy(logits[:, :-1][wanted].float(), ids_BT[:, 1:][wanted], reduction="sum")
        total += float(losses)
        count += int(wanted.sum())
        on_tokens(sum(len(block.ids) for block in batch))
    return total / count if count else float("nan")


@torch.no_grad()
def next_losses(model: PreTrainedModel, blocks: Sequence[Block], *, on_tokens: Advance = silent) -> torch.Tensor:
    """[N], for every token that `watch_inputs` shows and in its order: the loss of the token that follows.

    0 where none follows, or one that is not learnt.
    """
    found = []
    for batch in batches(blocks):
        ids_BT, mask_BT = padded(batch)
        logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        for row, block in enumerate(batch):
            length = len(block.ids)
            losses = functional.cross_entropy(
                logits[row, : length - 1].float(), ids_BT[row, 1:length], reduction="none"
            )
            learn = torch.tensor(block.learn[1:])
            found.append(functional.pad(losses * learn, (0, 1)))
        on_tokens(sum(len(block.ids) for block in batch))
    return torch.cat(found)


def batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks of like length together, at most BATCH_TOKENS with their padding."""
    batch: list[Block] = []
    for block in sorted(blocks, key=lambda each: len(each.ids)):
        if batch and len(block.ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def padded(batch: Sequence[Block]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids_BT, padded on the right with token 0, and mask_BT (bool), True for real tokens."""
    longest = max(len(block.ids) for block in batch)
    ids_BT = torch.tensor([[*block.ids, *[0] * (longest - len(block.ids))] for block in batch])
    mask_BT = torch.arange(longest)[None] < torch.tensor([len(block.ids) for block in batch])[:, None]
    return ids_BT, mask_BT
