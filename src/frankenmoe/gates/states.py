"""Router inputs: what every MoE block of a model reads, token by token, and the loss of the tokens that follow.

Shape suffixes: B blocks in a batch, T tokens, N real tokens of a batch, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.moe.trace import outer_blocks

BATCH_TOKENS = 2048
OnStates = Callable[[int, torch.Tensor], None]
"""Called with (layer, states_ND), once per batch and layer; the states are on the model's device."""
Advance = Callable[[int], None]
"""Called with the number of tokens that were just done."""


def silent(tokens: int) -> None:
    """Ignores progress."""


@torch.no_grad()
def watch_inputs(
    model: PreTrainedModel, blocks: Sequence[Block], on_states: OnStates, *, on_tokens: Advance = silent
) -> None:
    """Runs `blocks` and passes every layer's router input, [N, D] in float32 without padding, to `on_states`.

    Batches are padded on the right. With causal attention no real token sees the padding, so batching does not change
    its state.
    """
    decoder = model.get_decoder()
    for batch in batches(blocks):
        ids_BT, mask_BT = padded([block.ids for block in batch], device=model.device)
        with ExitStack() as hooks:
            for layer, moe_block in enumerate(outer_blocks(model).values()):
                hooks.callback(moe_block.register_forward_pre_hook(_listener(layer, mask_BT, on_states)).remove)
            decoder(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        on_tokens(sum(len(block.ids) for block in batch))


def _listener(layer: int, mask_BT: torch.Tensor, on_states: OnStates) -> Callable[[nn.Module, object], None]:
    def listen(_module: nn.Module, inputs: object) -> None:
        assert isinstance(inputs, tuple)
        hidden = inputs[0]
        on_states(layer, hidden.reshape(-1, hidden.shape[-1])[mask_BT.reshape(-1)].float())

    return listen


def mean_loss(model: PreTrainedModel, blocks: Sequence[Block], *, on_tokens: Advance = silent) -> float:
    """Nats per token over the tokens of `blocks` that are learnt; NaN if there are none."""
    count = sum(sum(block.learn[1:]) for block in blocks)
    return float(next_losses(model, blocks, on_tokens=on_tokens).double().sum()) / count if count else float("nan")


@torch.no_grad()
def next_losses(model: PreTrainedModel, blocks: Sequence[Block], *, on_tokens: Advance = silent) -> torch.Tensor:
    """losses_N, on the CPU: for every token, in the order of `watch_inputs`, the loss of the next token.

    Zero if there is no next token, or if it is not learnt.
    """
    found = []
    for batch in batches(blocks):
        ids_BT, mask_BT = padded([block.ids for block in batch], device=model.device)
        logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        for row, block in enumerate(batch):
            length = len(block.ids)
            losses = functional.cross_entropy(
                logits[row, : length - 1].float(), ids_BT[row, 1:length], reduction="none"
            )
            learn = torch.tensor(block.learn[1:], device=losses.device)
            found.append(functional.pad(losses * learn, (0, 1)).cpu())
        on_tokens(sum(len(block.ids) for block in batch))
    return torch.cat(found)


def batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Batches of blocks of similar length, each at most BATCH_TOKENS tokens including padding."""
    batch: list[Block] = []
    for block in sorted(blocks, key=lambda each: len(each.ids)):
        if batch and len(block.ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def padded(batch: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """ids_BT, padded on the right with token 0, and mask_BT (bool), True for real tokens."""
    longest = max(map(len, batch))
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch], device=device)
    mask_BT = torch.arange(longest)[None] < torch.tensor([len(ids) for ids in batch])[:, None]
    return ids_BT, mask_BT.to(device)
