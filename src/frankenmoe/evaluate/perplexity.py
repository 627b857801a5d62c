"""Mean next-token loss of any causal language model on a text."""

from typing import Any

from frankenmoe.data.blocks import text_blocks
from frankenmoe.data.rows import Document
from frankenmoe.gates import states


def mean_loss(model: Any, tokenizer: Any, text: str, *, block: int = 128) -> float:
    """Nats per token over `text`, cut into blocks of `block` tokens that begin with BOS if the tokenizer has one.

    Every token is predicted once, from the tokens before it in its block. Raises SourceError for a text of fewer than
    two tokens.
    """
    blocks = text_blocks([Document(text=text, closed=False)], tokenizer, length=block)
    return states.mean_loss(model, blocks)
