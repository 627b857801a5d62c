"""Recipe and headers -> plan and bill. Does not import torch and writes nothing."""

from frankenmoe.planning.plan import Plan, plan
from frankenmoe.planning.tree import ExpertNode

__all__ = ["ExpertNode", "Plan", "plan"]
