"""Gates with the least regret: fitted to the loss that each expert has on the next token.

Shape suffixes: N states, C classes, D hidden.
"""

import torch

from frankenmoe.gates.closed import centred
from frankenmoe.gates.logistic import SHRINK, States, logits, minimized, root, unwhitened

LABEL = 0.1  # weight of the domain-classification loss, against nats of the next token's loss
PENALTY = 1e-5
STEPS = 40


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
    weight_N = data.weight_N / data.weight_N.sum()
    root_DD = root(data, weight_N, shrink=SHRINK)
    begun_CD = start_CD.float() @ root_DD
    cost_NC = weight_N[:, None] * loss_NC
    if known_N is not None:
        cost_NC = cost_NC * known_N[:, None] / (weight_N * known_N).sum()
    target_NC = label * weight_N[:, None] * data.target_NC

    def loss(rows_CD: torch.Tensor) -> torch.Tensor:
        log_NC = logits(data.states_ND, rows_CD, root_DD).log_softmax(dim=1)
        each_NC = log_NC.exp() * cost_NC - target_NC * log_NC
        return each_NC.sum() + penalty * (rows_CD - begun_CD).square().sum()

    return centred(unwhitened(minimized(loss, begun_CD, steps=STEPS), root_DD)).double()
