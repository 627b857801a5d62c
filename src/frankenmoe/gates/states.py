"""Router inputs: what every MoE block of a model reads, token by token, and the loss of the tokens that follow.

With `together`, the processes of a launcher share the batches: all of them call the same functions in the same order.
Batches are the same for any number of processes, so every number that they compute is too.
Shape suffixes: B blocks in a batch, T tokens, N real tokens of all blocks, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.moe.processes import all_reduce, split
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.system import give_back_memory

BATCH_TOKENS = 2048
LOGITS_BYTES = 2**26  # of a batch's logits in float32, unless one block has more
WIDENED = 64  # tokens whose logits are converted to float32 at a time
OnStates = Callable[[int, torch.Tensor], None]
"""Called with (layer, states_ND), once per batch and layer; the states are on the model's device, in its type."""
Advance = Callable[[int], None]
"""Called with the number of tokens that were just done."""


def silent(tokens: int) -> None:
    """Ignores progress."""


@torch.no_grad()
def watch_inputs(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    on_states: OnStates,
    *,
    keep_N: torch.Tensor | None = None,
    together: bool = False,
    on_tokens: Advance = silent,
) -> None:
    """Runs `blocks` through the layers and passes every router's input, [N, D] without padding, to `on_states`.

    Batches are padded on the right. With causal attention no real token sees the padding, so batching does not change
    its state. The order of tokens is that of the blocks sorted by length. `keep_N` (bool) leaves out tokens. With
    `together`, each process gets the states of its own batches.
    """
    decoder = model.get_decoder()
    for start, batch in own_batches(blocks, together=together):
        ids_BT, mask_BT = padded([block.ids for block in batch], device=model.device)
        with _watched(model, mask_BT, on_states, keep_N=_part(keep_N, start, batch)):
            decoder(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        on_tokens(_length(batch))
    give_back_memory()


def mean_loss(
    model: PreTrainedModel, blocks: Sequence[Block], *, together: bool = False, on_tokens: Advance = silent
) -> float:
    """Nats per token over the tokens of `blocks` that are learnt; NaN if there are none."""
    return mean_of(next_losses(model, blocks, together=together, on_tokens=on_tokens), blocks)


def mean_of(losses_N: torch.Tensor, blocks: Sequence[Block]) -> float:
    """The mean of `next_losses` over the tokens that are learnt; NaN if there are none."""
    count = sum(sum(block.learn[1:]) for block in blocks)
    return float(losses_N.double().sum()) / count if count else float("nan")


@torch.no_grad()
def next_losses(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    *,
    on_states: OnStates | None = None,
    together: bool = False,
    on_tokens: Advance = silent,
) -> torch.Tensor:
    """losses_N, on the CPU: for every token, in the order of `watch_inputs`, the loss of the next token.

    Zero if there is no next token, or if it is not learnt. `on_states` gets the states, as from `watch_inputs`.
    """
    found_N = torch.zeros(_length(blocks))
    most = min(BATCH_TOKENS, LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size))
    for start, batch in own_batches(blocks, most=most, together=together):
        ids_BT, mask_BT = padded([block.ids for block in batch], device=model.device)
        with _watched(model, mask_BT, on_states) if on_states else ExitStack():
            logits = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        at = start
        for row, block in enumerate(batch):
            length = len(block.ids)
            for part in range(0, length - 1, WIDENED):
                end = min(part + WIDENED, length - 1)
                logits_TV, next_T = logits[row, part:end].float(), ids_BT[row, part + 1 : end + 1]
                found_N[at + part : at + end] = functional.cross_entropy(logits_TV, next_T, reduction="none").cpu()
            found_N[at : at + length - 1] *= torch.tensor(block.learn[1:])
            at += length
        on_tokens(_length(batch))
        del logits
    give_back_memory()
    return all_reduce(found_N) if together else found_N


def batches(blocks: Sequence[Block], *, most: int = BATCH_TOKENS) -> Iterator[list[Block]]:
    """Batches of blocks of similar length, each at most `most` tokens including padding, or one block."""
    batch: list[Block] = []
    for block in sorted(blocks, key=lambda each: len(each.ids)):
        if batch and len(block.ids) * (len(batch) + 1) > most:
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


def own_batches(
    blocks: Sequence[Block], *, most: int = BATCH_TOKENS, together: bool = False
) -> list[tuple[int, list[Block]]]:
    """(number of the first token, batch) for every batch that this process reads."""
    found, start = [], 0
    for batch in batches(blocks, most=most):
        found.append((start, batch))
        start += _length(batch)
    return split(found) if together else found


@contextmanager
def _watched(
    model: nn.Module, mask_BT: torch.Tensor, on_states: OnStates, *, keep_N: torch.Tensor | None = None
) -> Iterator[None]:
    with ExitStack() as hooks:
        for layer, moe_block in enumerate(outer_blocks(model).values()):
            hooks.callback(moe_block.register_forward_pre_hook(_listener(layer, mask_BT, on_states, keep_N)).remove)
        yield


def _listener(
    layer: int, mask_BT: torch.Tensor, on_states: OnStates, keep_N: torch.Tensor | None
) -> Callable[[nn.Module, object], None]:
    def listen(_module: nn.Module, inputs: object) -> None:
        assert isinstance(inputs, tuple)
        hidden = inputs[0]
        states_ND = hidden.reshape(-1, hidden.shape[-1])[mask_BT.reshape(-1)]
        on_states(layer, states_ND if keep_N is None else states_ND[keep_N.to(states_ND.device)])

    return listen


def _part(keep_N: torch.Tensor | None, start: int, batch: Sequence[Block]) -> torch.Tensor | None:
    return None if keep_N is None else keep_N[start : start + _length(batch)]


def _length(blocks: Sequence[Block]) -> int:
    return sum(len(block.ids) for block in blocks)
