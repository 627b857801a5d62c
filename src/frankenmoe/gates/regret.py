"""Gates with the least regret: fitted to the loss that each expert has on the next token.

Shape suffixes: N states, C classes, D hidden.
"""

import torch

from frankenmoe.gates.closed import centred
from frankenmoe.gates.logistic import SHRINK, Loss, States, logits, root, solved_twice, unwhitened

LABEL = 0.1  # weight of the domain-classification loss, against nats of the next token's loss
PENALTY = 1e-5
STEPS = 40
TINY = 1e-12


def regret(
    data: States,
    loss_NC: torch.Tensor,
    start_CD: torch.Tensor,
    *,
    known_N: torch.Tensor | None = None,
    label: float = LABEL,
    penalty: float = PENALTY,
) -> torch.Tensor:
    """The matrix [C, D] that minimizes the mean of sum_c softmax(W x)_c loss_c, starting from `start_CD`.

    `loss_NC` is the next token's loss with expert c in every layer, for the states `known_N` (by default all). Unlike a
    text's class, it says where the choice does not matter, and which expert is the safest while the domain is still
    unknown, as at the start of a text. Losses of single tokens are noisy, so the cross-entropy of the classes is added
    over all states with weight `label`. `penalty` weighs the mean square of the change of the logits. The problem is
    not convex, so the start matters.
    """
    root_DD = root(data, shrink=SHRINK)
    begun_CD = start_CD.float() @ root_DD
    known_N = torch.ones(len(loss_NC), dtype=torch.bool) if known_N is None else known_N

    def loss_of(some: torch.Tensor | slice) -> Loss:
        states_ND, weight_N = data.states_ND[some], data.weight_N[some] / data.weight_N[some].sum()
        share_N = weight_N * known_N[some]
        cost_CN = (share_N / share_N.sum().clamp(min=TINY) * loss_NC[some].T).contiguous()
        target_CN = (label * weight_N * data.target_NC[some].T).contiguous()

        def loss(rows_CD: torch.Tensor) -> torch.Tensor:
            log_CN = logits(states_ND, rows_CD, root_DD).log_softmax(dim=0)
            each_CN = log_CN.exp() * cost_CN - target_CN * log_CN
            return each_CN.sum() + penalty * (rows_CD - begun_CD).square().sum()

        return loss

    rows_CD = solved_twice(loss_of, begun_CD, count=len(loss_NC), steps=STEPS)
    return centred(unwhitened(rows_CD, root_DD)).double()
