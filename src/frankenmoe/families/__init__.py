"""Dense families and the MoE formats they become, as tables. Does not import torch."""

from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.formats import FORMATS, moe_config, rope
from frankenmoe.families.spec import Family, MoEFormat

__all__ = ["FAMILIES", "FORMATS", "Family", "MoEFormat", "moe_config", "rope"]
