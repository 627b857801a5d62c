"""Dense families and the MoE formats they become, as tables. Does not import torch."""

from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.formats import FORMATS, moe_config, rope
from frankenmoe.families.spec import Config, Dims, Family, MoEFormat, Note

__all__ = ["FAMILIES", "FORMATS", "Config", "Dims", "Family", "MoEFormat", "Note", "moe_config", "rope"]
