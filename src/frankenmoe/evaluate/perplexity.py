"""Mean next-token loss of any causal language model on a text.

Shape suffixes: B blocks in a batch, T tokens.
"""

from typing import Any

import torch
from torch.nn import functional

from frankenmoe.errors import SourceError

BATCH = 8


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, text: str, *, block: int = 128) -> float:
    """Nats per token over `text`, cut into blocks of `block` tokens that begin with BOS if the tokenizer has one.

    Every token is predicted once, from the tokens before it in its block. Raises SourceError for a text of fewer than
    two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = block - len(head)
    blocks = [head + ids[start : start + size] for start in range(0, len(ids), size)]
    blocks = [part for part in blocks if len(part) > 1]
    if not blocks:
        raise SourceError("the text has fewer than two tokens, so there is nothing to predict", hint="give more text")
    total, count = 0.0, 0
    for same_length in _batches(blocks):
        ids_BT = torch.tensor(same_length)
        logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))
        count += ids_BT[:, 1:].numel()
    return total / count


def _batches(blocks: list[list[int]]) -> list[list[list[int]]]:
    """Batches of equal lengths: whole blocks together, a shorter last one alone."""
    whole = [part for part in blocks if len(part) == len(blocks[0])]
    rest = [[part] for part in blocks if len(part) != len(blocks[0])]
    return [whole[start : start + BATCH] for start in range(0, len(whole), BATCH)] + rest
