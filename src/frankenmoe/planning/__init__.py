"""Recipe and headers to plan and bill; knows nothing of torch and writes nothing."""

from frankenmoe.planning.bill import Bill
from frankenmoe.planning.plan import Plan, plan
from frankenmoe.planning.tree import ExpertNode

__all__ = ["Bill", "ExpertNode", "Plan", "plan"]
