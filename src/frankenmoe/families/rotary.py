"""Rotary settings of a dense config, in one spelling."""

import math
from collections.abc import Mapping
from typing import Any

from frankenmoe.families.spec import FULL, Config, Family

CONTEXT = "original_max_position_embeddings"
# rotary types with a context of their own
WITH_CONTEXT = ("llama3", "yarn", "longrope")
TURNING = "longrope"  # the type that has other angles for inputs longer than its context
MOVING = ("dynamic", TURNING)  # types whose angles depend on the length of the whole input


def written_rope(config: Config) -> Any:
    """The rotary settings as a config writes them. Where it has both spellings, transformers takes `rope_scaling`."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def with_nested(rotary: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Written rotary settings, and those that are nested in them by kind of layer."""
    return (rotary, *(value for value in rotary.values() if isinstance(value, Mapping)))


def rope(family: Family, config: Config) -> dict[str, Any]:
    """Rotary settings as transformers 5's one dictionary, read from that form or from transformers 4's fields.

    For a family with settings by kind of layer, those of full attention.
    """
    if family.rope_by_kind:
        return dict(family.rope_by_kind(family.filled(config))[FULL])
    found = {key: value for key, value in written_rope(config).items() if value is not None}
    legacy = found.pop("type", "default")
    found.setdefault("rope_type", legacy)
    found["rope_type"] = family.rope_names.get(found["rope_type"], found["rope_type"])
    found.setdefault("rope_theta", family.value(config, "rope_theta"))
    partial = found.pop("partial_rotary_factor", None) or family.value(config, "partial_rotary_factor") or 1.0
    if partial != 1:
        found["partial_rotary_factor"] = partial
    if found["rope_type"] in WITH_CONTEXT:
        # as in transformers: a value beside the rotary settings counts more than one inside; without both, the
        # model's own context counts
        beside, own = (family.value(config, key) for key in (CONTEXT, "max_position_embeddings"))
        found[CONTEXT] = beside if beside is not None else found.get(CONTEXT, own)
    return found


def rotary_size(family: Family, config: Config) -> int:
    """How many numbers of each head are rotated."""
    return int(family.dims(config).head_dim * rope(family, config).get("partial_rotary_factor", 1.0))


def longrope_attention(rotary: Mapping[str, Any], context: int) -> float:
    """What longrope multiplies sines and cosines by, for a model of this context (arXiv 2402.13753, section 3.3)."""
    if rotary.get("attention_factor") is not None:
        return float(rotary["attention_factor"])
    before = float(rotary[CONTEXT])
    factor = float(rotary.get("factor") or context / before)
    return math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
