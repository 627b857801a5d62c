"""The gates of a finished mixture, row by row those of its experts. Does not import torch.

Shape suffixes: E experts, D hidden.
"""

from collections.abc import Iterator

import numpy as np

from frankenmoe.artifact.folder import Routers
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.values import check_finite, values
from frankenmoe.errors import PlanError
from frankenmoe.gates.chance import encoded
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED, router_names
from frankenmoe.planning.sources import Part
from frankenmoe.planning.tree import ExpertNode


def kept_routers(plan: Plan) -> Routers:
    """Every gate: each expert has the row that it has in its own mixture, and a gated shared expert its own gate.

    Raises PlanError for an expert that has no row, NumericsError for a gate that is not finite.
    """
    names = router_names(plan.fmt, layers=plan.layers, path=())
    rows = [list(_rows(_part(node))) for node in plan.nodes]
    found = {name: np.stack([row[layer] for row in rows]) for layer, name in enumerate(names)}
    if plan.gated_shared:
        shared = list(_rows(_part(plan.shared[0])))
        names = router_names(plan.fmt, layers=plan.layers, path=SHARED)
        found |= {name: row[None] for name, row in zip(names, shared, strict=True)}
    return encoded(plan, found)


def _part(node: ExpertNode) -> Part:
    part = node.source.part if node.source else None
    if part is None or not part.gates:
        raise PlanError(
            f"expert {node.name} has no gate of its own to keep", hint="choose another gate_mode for the routers"
        )
    return part


def _rows(part: Part) -> Iterator[Floats]:
    """An expert's row [D] of the gate of every layer."""
    for ref in part.gates:
        check_finite(ref)
        gate_ED = values(ref)
        yield gate_ED[int(part.name) if part.name.isdecimal() else 0]
