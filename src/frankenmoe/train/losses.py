"""The terms of the training loss as pure functions, each with its source.

Shape suffixes: T tokens, E experts, K top-k, M a teacher's kept tokens, V vocabulary.
"""

import torch
from torch.nn import functional


def next_token(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """loss_T: -log softmax(logits)[target] in float32, of a language model; 0 where the target is negative."""
    return functional.cross_entropy(logits_TV.float(), targets_T, ignore_index=-100, reduction="none")


def switch_balance(logits_TE: torch.Tensor, share_E: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e of one layer: 1 when balanced, at most E (Switch Transformer, arXiv 2101.03961, eq. 4).

    `share_E` is f, the share of all choices that each expert got; it has no gradient. P is the mean of the router's
    softmax. The caller averages over layers: if choices were pooled over layers, as in transformers, layers that are
    unbalanced in opposite ways would cancel.
    """
    probs_E = logits_TE.float().softmax(dim=-1).mean(dim=0)
    return logits_TE.shape[1] * (share_E.detach() * probs_E).sum()


def choice_counts(ids_TK: torch.Tensor, *, experts: int) -> torch.Tensor:
    """count_E: how often each expert was chosen, over all K choices; those dropped by a capacity (-1) do not count."""
    return torch.bincount(ids_TK[ids_TK >= 0], minlength=experts).float()


def router_z(logits_TE: torch.Tensor) -> torch.Tensor:
    """mean_t (log sum_e exp z_te)^2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps gate logits small."""
    return logits_TE.float().logsumexp(dim=-1).square().mean()


def domain(logits_TE: torch.Tensor, owner_T: torch.Tensor) -> torch.Tensor:
    """Mean -log softmax(logits)[owner] over tokens whose owner is an expert (>= 0); 0 if there is none.

    The gate as a classifier of the text's domain, as in DEMix (arXiv 2108.05036), but trained.
    """
    owned = owner_T >= 0
    loss_T = functional.cross_entropy(logits_TE.float(), owner_T.clamp(min=0), reduction="none")
    return (loss_T * owned).sum() / owned.sum().clamp(min=1)


def distill(logits_TV: torch.Tensor, teacher_TM: torch.Tensor, ids_TM: torch.Tensor) -> torch.Tensor:
    """kl_T: KL(teacher || student) at temperature 1 (arXiv 1503.02531), from the teacher's M largest log-probabilities.

    All other tokens count as one more outcome. So the result is exact over M + 1 outcomes, a lower bound of the full
    KL, and 0 only if both agree on all M + 1.
    """
    student_TM = logits_TV.float().log_softmax(dim=-1).gather(-1, ids_TM)
    teacher_TM = teacher_TM.float()
    rest_T, students_rest_T = (_rest(each) for each in (teacher_TM, student_TM))
    kept_T = (teacher_TM.exp() * (teacher_TM - student_TM)).sum(dim=-1)
    return kept_T + rest_T * (rest_T.log() - students_rest_T.log())


def _rest(log_probs_TM: torch.Tensor) -> torch.Tensor:
    """The probability of all tokens outside the M; at least 1e-6, so that its logarithm is finite."""
    return (1 - log_probs_TM.exp().sum(dim=-1)).clamp(min=1e-6)
