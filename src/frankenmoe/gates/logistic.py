"""Gates by softmax regression on states: convex, so there is one answer; knows nothing of models, layers or files.

Shape suffixes: N states, C classes, D hidden.
"""

from dataclasses import dataclass

import torch

from frankenmoe.gates.closed import centred, shrunk

PENALTY = 1e-3
SHRINK = 1e-1
STEPS = 60
MEMORY = 10  # pairs that L-BFGS remembers


@dataclass(frozen=True)
class States:
    """States [N, D], what share of each class each should get [N, C], and how much each counts [N]."""

    states_ND: torch.Tensor
    target_NC: torch.Tensor
    weight_N: torch.Tensor


def logistic(data: States, *, penalty: float = PENALTY, shrink: float = SHRINK, steps: int = STEPS) -> torch.Tensor:
    """The matrix [C, D] that minimises the weighted cross-entropy of softmax(W x) and the targets, plus a penalty.

    The penalty is `penalty` times the mean square of the logits that W gives to states of the weighted second moment,
    to which `shrink` of its mean eigenvalue is added: directions with hardly any variance stay unused. L-BFGS in those
    coordinates, in which the states are white, needs a few dozen steps over the states in memory.
    """
    weight_N = data.weight_N / data.weight_N.sum()
    whiten_DD, _ = whitening(data.states_ND, weight_N, shrink=shrink)
    white_ND = data.states_ND @ whiten_DD
    rows_CD = torch.zeros(data.target_NC.shape[1], white_ND.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([rows_CD], max_iter=steps, history_size=MEMORY, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        log_NC = (white_ND @ rows_CD.T).log_softmax(dim=1)
        value: torch.Tensor = -(weight_N[:, None] * data.target_NC * log_NC).sum() + penalty * rows_CD.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return centred(rows_CD.detach() @ whiten_DD.T).double()


def whitening(states_ND: torch.Tensor, weight_N: torch.Tensor, *, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, Q) [D, D] of the weighted second moment plus `shrink` of its mean eigenvalue: x P is white, and P Q' = 1."""
    moment_DD = (states_ND.T * weight_N @ states_ND).double()
    values_D, vectors_DD = torch.linalg.eigh(shrunk(moment_DD, shrink))
    return (vectors_DD / values_D.sqrt()).float(), (vectors_DD * values_D.sqrt()).float()
