"""Gates that lose least: fitted to what each expert would have cost, token by token; knows nothing of models or files.

Shape suffixes: N states, C classes, D hidden.
"""

import torch

from frankenmoe.gates.closed import centred
from frankenmoe.gates.logistic import SHRINK, States, whitening

LABEL = 0.1  # how much the class of a text counts, per nat of what an expert costs
PENALTY = 1e-5
STEPS = 40
MEMORY = 10  # pairs that L-BFGS remembers


def regret(
    data: States, loss_NC: torch.Tensor, start_CD: torch.Tensor, *, label: float = LABEL, penalty: float = PENALTY
) -> torch.Tensor:
    """The matrix [C, D] that minimises the mean of sum_c softmax(W x)_c loss_c, near `start_CD`.

    `loss_NC` is the next token's loss with expert c in every layer. Where it does not matter whose text it is nothing
    is to be lost, and where nobody can know (a text has just begun) the expert that costs least if it is wrong is the
    one to take; the class alone says neither. Losses of single tokens are noisy, so the cross-entropy of the classes
    stays in it with a weight of `label`, and `penalty` counts the mean square of what the logits change. Not convex,
    hence the start.
    """
    weight_N = data.weight_N / data.weight_N.sum()
    whiten_DD, unwhiten_DD = whitening(data.states_ND, weight_N, shrink=SHRINK)
    white_ND = data.states_ND @ whiten_DD
    begun_CD = start_CD.float() @ unwhiten_DD
    rows_CD = begun_CD.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([rows_CD], max_iter=STEPS, history_size=MEMORY, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        log_NC = (white_ND @ rows_CD.T).log_softmax(dim=1)
        each_NC = log_NC.exp() * loss_NC - label * data.target_NC * log_NC
        value: torch.Tensor = (weight_N[:, None] * each_NC).sum() + penalty * (rows_CD - begun_CD).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return centred(rows_CD.detach() @ whiten_DD.T).double()
