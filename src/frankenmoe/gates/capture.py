"""What the layers of a dense model receive for a prompt.

Shape suffixes: B prompts in a batch, L layers, T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from frankenmoe.gates.states import padded

BATCH = 8


def encode(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids per prompt as in mergekit-moe: the BOS text in front, no other special tokens."""
    bos = tokenizer.bos_token or ""
    return [tokenizer(bos + prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """states_LTD per prompt, on the CPU: the residual stream that enters each layer, over the prompt's own tokens.

    Batches are padded on the right. With causal attention no real token sees the padding, so batching does not change
    its states.
    """
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        ids_BT, mask_BT = padded(batch, device=model.device)
        decoder = model.get_decoder()
        out = decoder(input_ids=ids_BT, attention_mask=mask_BT.long(), output_hidden_states=True, use_cache=False)
        states_BLTD = torch.stack(out.hidden_states[:-1], dim=1)
        for ids, states_LTD in zip(batch, states_BLTD, strict=True):
            yield states_LTD[:, : len(ids)].cpu()
