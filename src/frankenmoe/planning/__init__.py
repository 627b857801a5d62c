"""Recipe and headers -> plan and bill. Does not import torch and writes nothing."""

from frankenmoe.planning.make import plan
from frankenmoe.planning.plan import Plan
from frankenmoe.planning.tree import ExpertNode

__all__ = ["ExpertNode", "Plan", "plan"]
