"""Statistics of routing: pure functions of counts, gates and Gram matrices.

Shape suffixes: C domains, E experts, D hidden, K top-k.
"""

import math
from collections.abc import Sequence

import torch

TINY = 1e-12
EPSILON = torch.finfo(torch.float64).eps


def load(counts_E: torch.Tensor) -> torch.Tensor:
    """load_E: each expert's share of the assignments. Sums to 1; all zero if there are none."""
    return counts_E.double() / counts_E.sum().clamp(min=1)


def coefficient_of_variation(counts_E: torch.Tensor) -> float:
    """Population standard deviation of the counts over their mean: 0 if even, sqrt(E - 1) if one expert gets all."""
    wide_E = counts_E.double()
    return float(wide_E.std(unbiased=False) / wide_E.mean().clamp(min=TINY))


def max_violation(counts_E: torch.Tensor) -> float:
    """MaxVio (arXiv 2408.15664, eq. 4): (largest count - mean) / mean; 0 if even, E - 1 if one expert gets all."""
    mean = float(counts_E.double().mean())
    return (float(counts_E.max()) - mean) / mean if mean else 0.0


def dead(counts_E: torch.Tensor) -> list[int]:
    """Indices of the experts without any assignment."""
    return [expert for expert, count in enumerate(counts_E.tolist()) if count == 0]


def capacity(factor: float, *, assignments: int, experts: int) -> int:
    """Most assignments an expert takes: ceil(factor * assignments / experts), as in arXiv 2101.03961, section 2.2."""
    return math.ceil(round(factor * assignments / experts, 9))


def overflow(counts_E: torch.Tensor, *, factor: float) -> int:
    """Assignments over capacity: sum_e max(0, count_e - capacity)."""
    limit = capacity(factor, assignments=int(counts_E.sum()), experts=len(counts_E))
    return int((counts_E - limit).clamp(min=0).sum())


def switch_balance(counts_E: torch.Tensor, prob_E: torch.Tensor) -> float:
    """E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eq. 4 without alpha): 1 when balanced, at most E.

    `counts_E` are the choices before any is dropped, as in eq. 5, and `prob_E` are the mean probabilities. f sums to 1.
    In transformers' `load_balancing_loss_func` f sums to K, so its balanced value is K.
    """
    return float(len(counts_E) * load(counts_E) @ prob_E.double())


def mutual_information(counts_CE: torch.Tensor) -> float:
    """Mutual information of expert and domain in bits: 0 to log2(min(C, E)).

    Every domain has the same weight, however much text it has. Domains without an assignment are left out.
    """
    wide_CE = counts_CE.double()
    wide_CE = wide_CE[wide_CE.sum(dim=1) > 0]
    if not len(wide_CE):
        return 0.0
    joint_CE = wide_CE / wide_CE.sum(dim=1, keepdim=True) / len(wide_CE)
    apart_CE = joint_CE.sum(dim=1, keepdim=True) * joint_CE.sum(dim=0, keepdim=True)
    terms_CE = joint_CE * (joint_CE.clamp(min=TINY) / apart_CE.clamp(min=TINY)).log2()
    return max(0.0, float(terms_CE.sum()))


def own_share(counts_CE: torch.Tensor, own: Sequence[int | None], *, tokens_C: torch.Tensor) -> list[float | None]:
    """Per domain, the share of its tokens that its own expert got; None without an own expert or without tokens."""
    return [
        None if expert is None or not tokens else float(counts_CE[row, expert]) / tokens
        for row, (expert, tokens) in enumerate(zip(own, tokens_C.tolist(), strict=True))
    ]


def cosines(gate_ED: torch.Tensor) -> torch.Tensor:
    """cosines_EE between the rows of a gate; a row of zeros has cosine 0 with every other row."""
    wide_ED = gate_ED.double()
    unit_ED = wide_ED / torch.linalg.vector_norm(wide_ED, dim=1, keepdim=True).clamp(min=TINY)
    cosines_EE: torch.Tensor = unit_ED @ unit_ED.T
    return cosines_EE


def largest_cosine(gate_ED: torch.Tensor) -> tuple[float, tuple[int, int]] | None:
    """The largest cosine of two different rows, and their indices; None for a single row."""
    experts = len(gate_ED)
    if experts < 2:
        return None
    off_EE = cosines(gate_ED).masked_fill(torch.eye(experts, dtype=torch.bool), -math.inf)
    one, two = divmod(int(off_EE.argmax()), experts)
    return float(off_EE[one, two]), (one, two)


def condition_number(gate_ED: torch.Tensor) -> float:
    """Largest over smallest singular value: 1 for orthogonal rows of equal length, infinite for dependent rows."""
    singular = torch.linalg.svdvals(gate_ED.double())
    return _ratio(float(singular[0]), float(singular[-1]), noise=_noise(gate_ED))


def centred_condition_number(gate_ED: torch.Tensor) -> float:
    """The same for the rows minus their mean, without the direction that this removes; 1 for a single row.

    A shift of all rows moves all logits alike, so it changes neither the choice nor the softmax weights.
    """
    experts = len(gate_ED)
    if experts < 2:
        return 1.0
    wide_ED = gate_ED.double()
    singular = torch.linalg.svdvals(wide_ED - wide_ED.mean(dim=0))
    return _ratio(float(singular[0]), float(singular[min(experts - 1, len(singular)) - 1]), noise=_noise(gate_ED))


def _noise(gate_ED: torch.Tensor) -> float:
    """The size that a zero singular value can have by rounding in float64."""
    return float(torch.linalg.matrix_norm(gate_ED.double(), ord=2)) * max(gate_ED.shape) * EPSILON


def _ratio(largest: float, smallest: float, *, noise: float) -> float:
    return largest / smallest if smallest > noise else math.inf


def pair_distances(gram_EE: torch.Tensor, *, scale: float) -> torch.Tensor:
    """distance_EE: Frobenius distances of experts, from the Gram matrix of their differences from one reference.

    |a - b|^2 = <a, a> + <b, b> - 2 <a, b>, divided by `scale`, the norm that distances are relative to.
    """
    own_E = gram_EE.diagonal()
    squared_EE = (own_E[:, None] + own_E[None, :] - 2 * gram_EE).clamp(min=0)
    squared_EE.fill_diagonal_(0)
    return squared_EE.sqrt() / max(scale, TINY)


def reference_distances(gram_EE: torch.Tensor, *, scale: float) -> torch.Tensor:
    """distance_E: the distance of each expert from the reference, divided by `scale`."""
    return gram_EE.diagonal().clamp(min=0).sqrt() / max(scale, TINY)


def off_diagonal(square_EE: torch.Tensor) -> torch.Tensor:
    """The entries above the diagonal, one per pair."""
    experts = len(square_EE)
    rows, columns = torch.triu_indices(experts, experts, offset=1)
    return square_EE[rows, columns]


def others(ranked_TE: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """others_TK: the K best experts that were not chosen; they repeat if there are fewer than K of them.

    `ranked_TE` are the experts by descending logit, more than K.
    """
    rest = ranked_TE.shape[1] - top_k
    columns = torch.arange(top_k, device=ranked_TE.device) % rest + top_k
    return ranked_TE[:, columns]
