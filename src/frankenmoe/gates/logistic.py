"""Gates by softmax regression on states. The problem is convex, so the solution is unique.

Shape suffixes: N states, C classes, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from frankenmoe.gates.closed import centred, shrunk

PENALTY = 1e-3
SHRINK = 1e-1
STEPS = 60
MEMORY = 10  # history of L-BFGS


@dataclass(frozen=True)
class States:
    """States [N, D], the target distribution over classes of each [N, C], the weight of each [N], and their second
    moment [D, D] if it is known."""

    states_ND: torch.Tensor
    target_NC: torch.Tensor
    weight_N: torch.Tensor
    moment_DD: torch.Tensor | None = None


def logistic(data: States, *, penalty: float = PENALTY, shrink: float = SHRINK, steps: int = STEPS) -> torch.Tensor:
    """The matrix [C, D] that minimizes the weighted cross-entropy of softmax(W x) and the targets, plus a penalty.

    The penalty is `penalty` times the mean square of the logits. For it, `shrink` of the mean eigenvalue is added to
    the second moment of the states, so directions with little variance stay unused. L-BFGS runs in coordinates in which
    states are white, where it needs a few dozen steps.
    """
    weight_N = data.weight_N / data.weight_N.sum()
    root_DD = root(data, weight_N, shrink=shrink)

    def loss(rows_CD: torch.Tensor) -> torch.Tensor:
        log_NC = logits(data.states_ND, rows_CD, root_DD).log_softmax(dim=1)
        return penalty * rows_CD.square().sum() - (weight_N[:, None] * data.target_NC * log_NC).sum()

    rows_CD = minimized(loss, torch.zeros(data.target_NC.shape[1], data.states_ND.shape[1]), steps=steps)
    return centred(unwhitened(rows_CD, root_DD)).double()


def minimized(loss: Callable[[torch.Tensor], torch.Tensor], start_CD: torch.Tensor, *, steps: int) -> torch.Tensor:
    """The rows [C, D] at which L-BFGS finds the smallest loss, from `start_CD` on."""
    rows_CD = start_CD.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([rows_CD], max_iter=steps, history_size=MEMORY, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(rows_CD)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(step)  # type: ignore[no-untyped-call]
    return rows_CD.detach()


def root(data: States, weight_N: torch.Tensor, *, shrink: float) -> torch.Tensor:
    """L [D, D], lower triangular: L L' is the weighted second moment plus `shrink` of its mean eigenvalue."""
    moment_DD = data.moment_DD
    if moment_DD is None:
        moment_DD = (data.states_ND.T * weight_N @ data.states_ND).double()
    root_DD: torch.Tensor = torch.linalg.cholesky(shrunk(moment_DD, shrink))
    return root_DD.float()


def unwhitened(rows_CD: torch.Tensor, root_DD: torch.Tensor) -> torch.Tensor:
    """W [C, D], whose logits W x are those of the rows [C, D] for white states L^-1 x."""
    weight_CD: torch.Tensor = torch.linalg.solve_triangular(root_DD, rows_CD, upper=False, left=False)
    return weight_CD


def logits(states_ND: torch.Tensor, rows_CD: torch.Tensor, root_DD: torch.Tensor) -> torch.Tensor:
    """logits_NC of white states. Only the few rows are transformed, never the states."""
    return states_ND @ unwhitened(rows_CD, root_DD).T
