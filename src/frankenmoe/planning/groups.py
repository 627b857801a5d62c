"""The groups of backbone tensors: attention, norms, embeddings and head. Does not import torch."""

import re
from collections.abc import Mapping

from frankenmoe.planning.sources import FFN_NAME
from frankenmoe.recipe.backbone import ATTENTION, EMBEDDINGS, HEAD, NORMS

FFN = "ffn"
# in this order, for the families with a table and for the other decoders of transformers
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    FFN: FFN_NAME,
    HEAD: re.compile(r"^(lm_head|embed_out|output)\."),
    NORMS: re.compile(r"norm|(^|\.)ln_\w+\."),
    EMBEDDINGS: re.compile(r"embed|(^|\.)w[tp]e\."),
}


def group_of(name: str) -> str:
    """The group of a dense tensor; what belongs to no other group counts as attention."""
    return next((group for group, pattern in _PATTERNS.items() if pattern.search(name)), ATTENTION)
