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
    """States [N, D], the target distribution over classes of each [N, C], and the weight of each [N]."""

    states_ND: torch.Tensor
    target_NC: torch.Tensor
    weight_N: torch.Tensor


def logistic(data: States, *, penalty: float = PENALTY, shrink: float = SHRINK, steps: int = STEPS) -> torch.Tensor:
    """The matrix [C, D] that minimizes the weighted cross-entropy of softmax(W x) and the targets, plus a penalty.

    The penalty is `penalty` times the mean square of the logits. For it, `shrink` of the mean eigenvalue is added to
    the weighted second moment of the states, so directions with little variance stay unused. L-BFGS runs on whitened
    states, where it needs a few dozen steps.
    """
    weight_N = data.weight_N / data.weight_N.sum()
    whiten_DD, _ = whitening(data.states_ND, weight_N, shrink=shrink)
    white_ND = data.states_ND @ whiten_DD

    def loss(rows_CD: torch.Tensor) -> torch.Tensor:
        log_NC = (white_ND @ rows_CD.T).log_softmax(dim=1)
        return penalty * rows_CD.square().sum() - (weight_N[:, None] * data.target_NC * log_NC).sum()

    rows_CD = minimized(loss, torch.zeros(data.target_NC.shape[1], white_ND.shape[1]), steps=steps)
    return centred(rows_CD @ whiten_DD.T).double()


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


def whitening(states_ND: torch.Tensor, weight_N: torch.Tensor, *, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, Q) [D, D]: x P is white by the weighted second moment plus `shrink` of its mean eigenvalue; P Q' = 1."""
    moment_DD = (states_ND.T * weight_N @ states_ND).double()
    values_D, vectors_DD = torch.linalg.eigh(shrunk(moment_DD, shrink))
    return (vectors_DD / values_D.sqrt()).float(), (vectors_DD * values_D.sqrt()).float()
