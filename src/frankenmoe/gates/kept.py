"""The gates of a finished mixture, row by row those of its experts. Does not import torch.

Shape suffixes: E experts, D hidden.
"""

import numpy as np

from frankenmoe.artifact.folder import Routers
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.checkpoint.values import check_finite, values
from frankenmoe.errors import PlanError
from frankenmoe.gates.chance import encoded
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.sources import Part
from frankenmoe.planning.tree import ExpertNode


def kept_routers(plan: Plan) -> Routers:
    """Every gate: each expert has the row that it has in its own mixture, and a gated shared expert its own gate.

    Raises PlanError for an expert that has no row, NumericsError for a gate that is not finite.
    """
    found = {}
    for path, nodes in (((), plan.nodes), (SHARED, plan.shared if plan.gated_shared else ())):
        parts = [_part(node) for node in nodes]
        names = plan.router_names(path).values() if parts else []
        for layer, name in enumerate(names):
            gates = {ref: _gate(ref) for ref in dict.fromkeys(part.gates[layer] for part in parts)}
            found[name] = np.stack([gates[part.gates[layer]][_row(part)] for part in parts])
    return encoded(plan, found)


def _part(node: ExpertNode) -> Part:
    part = node.source.part if node.source else None
    if part is None or not part.gates:
        raise PlanError(
            f"expert {node.name} has no gate of its own to keep", hint="choose another gate_mode for the routers"
        )
    return part


def _gate(ref: TensorRef) -> Floats:
    """A gate [E, D]."""
    check_finite(ref)
    return values(ref)


def _row(part: Part) -> int:
    return int(part.name) if part.name.isdecimal() else 0
