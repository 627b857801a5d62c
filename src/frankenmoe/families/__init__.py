"""Dense families and the MoE formats they become, as tables. Does not import torch."""

from frankenmoe.families.config import moe_config, unsupported
from frankenmoe.families.dense import FAMILIES, FFN_PARTS, MLPS, OPAQUE
from frankenmoe.families.formats import FORMATS
from frankenmoe.families.known import is_neutral
from frankenmoe.families.rotary import rope, rotary_size
from frankenmoe.families.spec import SOFTMAX, Family, MoEFormat
from frankenmoe.families.virtual import PARTLY, VIRTUAL, why_virtual
from frankenmoe.families.wrapped import prefixes_of, text_config, text_name, wrapper_of

__all__ = [
    "FAMILIES",
    "FFN_PARTS",
    "FORMATS",
    "MLPS",
    "OPAQUE",
    "PARTLY",
    "SOFTMAX",
    "VIRTUAL",
    "Family",
    "MoEFormat",
    "is_neutral",
    "moe_config",
    "prefixes_of",
    "rope",
    "rotary_size",
    "text_config",
    "text_name",
    "unsupported",
    "why_virtual",
    "wrapper_of",
]
