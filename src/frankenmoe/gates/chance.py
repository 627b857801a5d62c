"""Random gates. Drawn with numpy, so they do not need torch and are the same on every machine.

Shape suffixes: E experts, D hidden.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from frankenmoe.artifact.folder import Routers
from frankenmoe.checkpoint.cast import encode
from frankenmoe.planning import Plan
from frankenmoe.planning.tree import tensor_seed


def random_routers(plan: Plan) -> Routers:
    """Name -> (dtype, shape, bytes) of every gate, each drawn from its own seed."""
    draw = RANDOM_ROWS[plan.recipe.gate_mode]
    seeds = {name: tensor_seed(plan.recipe.seed, (), name) for name in plan.routers}
    rows = {
        name: draw(np.random.Generator(np.random.Philox(seeds[name])), *shape) for name, shape in plan.routers.items()
    }
    return encoded(plan, rows)


def encoded(plan: Plan, rows: Mapping[str, NDArray[np.float32]]) -> Routers:
    """Gates by name, from float32 to the plan's type: name -> (dtype, shape, bytes)."""
    return {
        name: (plan.dtype, shape, encode(np.ascontiguousarray(rows[name]).reshape(-1), dtype=plan.dtype))
        for name, shape in plan.routers.items()
    }


def random_rows(generator: np.random.Generator, experts: int, hidden: int) -> NDArray[np.float32]:
    """`random`: standard normal, [E, D]."""
    return generator.standard_normal((experts, hidden), np.float32)


def uniform_rows(generator: np.random.Generator, experts: int, hidden: int) -> NDArray[np.float32]:
    """`uniform_random`: uniform in +-1/sqrt(hidden), the default of torch.nn.Linear, [E, D]."""
    bound = 1 / math.sqrt(hidden)
    return generator.uniform(-bound, bound, (experts, hidden)).astype(np.float32)


RANDOM_ROWS: Mapping[str, Callable[[np.random.Generator, int, int], NDArray[np.float32]]] = {
    "random": random_rows,
    "uniform_random": uniform_rows,
}
