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
MANY = 4096  # states; from four times as many on, the first steps take a quarter of them
GOLDEN = 0.6180339887498949  # multiples of it modulo one fill an interval evenly


Loss = Callable[[torch.Tensor], torch.Tensor]
"""Rows [C, D] for white states -> the loss."""


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
    root_DD = root(data, shrink=shrink)

    def loss_of(some: torch.Tensor | slice) -> Loss:
        states_ND, weight_N = data.states_ND[some], data.weight_N[some] / data.weight_N[some].sum()
        target_CN = (weight_N[:, None] * data.target_NC[some]).T.contiguous()

        def loss(rows_CD: torch.Tensor) -> torch.Tensor:
            log_CN = logits(states_ND, rows_CD, root_DD).log_softmax(dim=0)
            return penalty * rows_CD.square().sum() - (target_CN * log_CN).sum()

        return loss

    start_CD = torch.zeros(data.target_NC.shape[1], data.states_ND.shape[1])
    rows_CD = solved_twice(loss_of, start_CD, count=len(data.states_ND), steps=steps)
    return centred(unwhitened(rows_CD, root_DD)).double()


def solved_twice(
    loss_of: Callable[[torch.Tensor | slice], Loss], start_CD: torch.Tensor, *, count: int, steps: int
) -> torch.Tensor:
    """Minimizes the loss of a quarter of the `count` states in half of the steps, then that of all in a quarter.

    Few states take all steps at once.
    """
    if count < 4 * MANY:
        return minimized(loss_of(slice(None)), start_CD, steps=steps)
    quarter_N = (torch.arange(count, dtype=torch.float64) * GOLDEN) % 1 < 0.25
    begun_CD = minimized(loss_of(quarter_N), start_CD, steps=steps // 2)
    return minimized(loss_of(slice(None)), begun_CD, steps=steps // 4)


def minimized(loss: Loss, start_CD: torch.Tensor, *, steps: int) -> torch.Tensor:
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


def root(data: States, *, shrink: float) -> torch.Tensor:
    """L [D, D], lower triangular: L L' is the weighted second moment plus `shrink` of its mean eigenvalue."""
    moment_DD = data.moment_DD
    if moment_DD is None:
        weight_N = data.weight_N / data.weight_N.sum()
        moment_DD = (data.states_ND.T * weight_N @ data.states_ND).double()
    root_DD: torch.Tensor = torch.linalg.cholesky(shrunk(moment_DD, shrink))
    return root_DD.float()


def unwhitened(rows_CD: torch.Tensor, root_DD: torch.Tensor) -> torch.Tensor:
    """W [C, D], whose logits W x are those of the rows [C, D] for white states L^-1 x."""
    weight_CD: torch.Tensor = torch.linalg.solve_triangular(root_DD, rows_CD, upper=False, left=False)
    return weight_CD


def logits(states_ND: torch.Tensor, rows_CD: torch.Tensor, root_DD: torch.Tensor) -> torch.Tensor:
    """logits_CN of white states. Only the few rows are transformed, never the states.

    With the classes in front, products with the states are two to three times faster. The rows are made contiguous: for
    the transposed layout that `solve_triangular` returns, autograd chooses a product that takes ten times as long.
    """
    return unwhitened(rows_CD, root_DD).contiguous() @ states_ND.T
