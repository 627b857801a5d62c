"""Gates with the least regret: fitted to the loss that each expert has on the next token.

Shape suffixes: N states, C classes, D hidden.
"""

import torch

from frankenmoe.gates.closed import centred
from frankenmoe.gates.logistic import SHRINK, States, minimized, whitening

LABEL = 0.1  # weight of the domain-classification loss, against nats of the next token's loss
PENALTY = 1e-5
STEPS = 40


def regret(
    data: States, loss_NC: torch.Tensor, start_CD: torch.Tensor, *, label: float = LABEL, penalty: float = PENALTY
) -> torch.Tensor:
    """The matrix [C, D] that minimizes the mean of sum_c softmax(W x)_c loss_c, starting from `start_CD`.

    `loss_NC` is the next token's loss with expert c in every layer. Unlike a text's class, it says where the choice
    does not matter, and which expert is the safest while the domain is still unknown, as at the start of a text. Losses
    of single tokens are noisy, so the cross-entropy of the classes is added with weight `label`. `penalty` weighs the
    mean square of the change of the logits. The problem is not convex, so the start matters.
    """
    weight_N = data.weight_N / data.weight_N.sum()
    whiten_DD, unwhiten_DD = whitening(data.states_ND, weight_N, shrink=SHRINK)
    white_ND = data.states_ND @ whiten_DD
    begun_CD = start_CD.float() @ unwhiten_DD

    def loss(rows_CD: torch.Tensor) -> torch.Tensor:
        log_NC = (white_ND @ rows_CD.T).log_softmax(dim=1)
        each_NC = log_NC.exp() * loss_NC - label * data.target_NC * log_NC
        return (weight_N[:, None] * each_NC).sum() + penalty * (rows_CD - begun_CD).square().sum()

    return centred(minimized(loss, begun_CD, steps=STEPS) @ whiten_DD.T).double()
