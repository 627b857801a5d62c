"""Rotary settings of a dense config, in one spelling."""

import math
from collections.abc import Mapping
from typing import Any

from frankenmoe.families.spec import FULL, Config, Family

# rotary types with a context of their own
WITH_CONTEXT = ("llama3", "yarn", "longrope")


def rope(family: Family, config: Config) -> dict[str, Any]:
    """Rotary settings as transformers 5's one dictionary, read from that form or from transformers 4's fields.

    Where a config has both, transformers takes `rope_scaling`. For a family with settings by kind of layer, those of
    full attention.
    """
    if family.rope_by_kind:
        return dict(family.rope_by_kind(family.filled(config))[FULL])
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    found = {key: value for key, value in given.items() if value is not None}
    legacy = found.pop("type", "default")
    found.setdefault("rope_type", legacy)
    found["rope_type"] = family.rope_names.get(found["rope_type"], found["rope_type"])
    found.setdefault("rope_theta", family.value(config, "rope_theta"))
    partial = found.pop("partial_rotary_factor", None) or family.value(config, "partial_rotary_factor") or 1.0
    if partial != 1:
        found["partial_rotary_factor"] = partial
    # a value beside the rotary settings counts more than one inside, as in transformers
    context = family.value(config, "original_max_position_embeddings")
    if context is not None and found["rope_type"] in WITH_CONTEXT:
        found["original_max_position_embeddings"] = context
    return found


def rotary_size(family: Family, config: Config) -> int:
    """How many numbers of each head are rotated."""
    return int(family.dims(config).head_dim * rope(family, config).get("partial_rotary_factor", 1.0))


def longrope_attention(rotary: Mapping[str, Any], context: int) -> float:
    """What longrope multiplies sines and cosines by, for a model of this context (arXiv 2402.13753, section 3.3)."""
    if rotary.get("attention_factor") is not None:
        return float(rotary["attention_factor"])
    before = float(rotary["original_max_position_embeddings"])
    factor = float(rotary.get("factor") or context / before)
    return math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
