"""What a dense model's layers receive for a prompt; knows nothing of experts or of what is made of it.

Shape suffixes: B prompts in a batch, L layers, T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

BATCH = 8


def encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids per prompt, as mergekit-moe makes them: the BOS text in front, no other special tokens."""
    bos = tokenizer.bos_token or ""
    return [tokenizer(bos + prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """For each prompt [L, T, D]: the residual stream that enters each layer, over its own tokens only.

    Prompts go in batches padded on the right: with causal attention no real token sees the padding, so a prompt's
    states are the same alone and in company.
    """
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        longest = max(map(len, batch))
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
        decoder = model.get_decoder()
        out = decoder(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False)
        states_BLTD = torch.stack(out.hidden_states[:-1], dim=1)
        for ids, states_LTD in zip(batch, states_BLTD, strict=True):
            yield states_LTD[:, : len(ids)]
