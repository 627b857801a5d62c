"""Closed-form gates from sums: pure functions, one per method. Each returns a matrix without a bias.

A router computes W x, without bias or temperature. A method's bias b is therefore folded into W as b v', with a
direction v for which v x is as close to 1 as possible.
Shape suffixes: U texts, C classes, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from frankenmoe.gates.statistics import RouterStatistics

RIDGE = 1e-2  # penalty, as a share of the mean eigenvalue
SHRINK = 1e-2  # shrinkage of a covariance before it is inverted, likewise


@dataclass(frozen=True)
class Sums:
    """One layer's balanced sums in float64: class means, their mean, and the second moment per token."""

    means_CD: torch.Tensor
    mean_D: torch.Tensor
    second_DD: torch.Tensor


def sums_of(statistics: RouterStatistics, layer: int) -> Sums:
    """The sums of one layer. Classes have equal weight, whatever their number of tokens, texts or negative prompts."""
    share_UC = statistics.targets() * statistics.weights()[:, None]
    means_CD = (share_UC / share_UC.sum(dim=0)).T @ statistics.mean_ULD[:, layer]
    return Sums(means_CD, means_CD.mean(dim=0), statistics.second_LDD[layer] / statistics.weights().sum())


def centroid(sums: Sums) -> torch.Tensor:
    """Nearest class mean, [C, D]: score mu_c x - |mu_c|^2 / 2, with the bias folded into the means' directions."""
    centred_CD = sums.means_CD - sums.mean_D
    bias_C = -0.5 * sums.means_CD.square().sum(dim=1)
    return centred(centred_CD + folded(bias_C, sums.means_CD, sums.means_CD))


def lda(sums: Sums, *, shrink: float = SHRINK) -> torch.Tensor:
    """Fisher's linear discriminant, [C, D]: score mu_c S^-1 (x - mu_c / 2) with S the covariance within classes.

    The bias goes into the direction with v mu_c = 1 for every class that varies least within classes.
    """
    between_DD = sums.means_CD.T @ sums.means_CD / len(sums.means_CD)
    within_DD = shrunk(sums.second_DD - between_DD, shrink)
    rows_CD = torch.linalg.solve(within_DD, sums.means_CD.T).T
    bias_C = -0.5 * (rows_CD * sums.means_CD).sum(dim=1)
    return centred(rows_CD + folded(bias_C, rows_CD, sums.means_CD))


def ridge(sums: Sums, *, penalty: float = RIDGE) -> torch.Tensor:
    """Least squares on the one-hot class, [C, D]: (A + l I)^-1 mu_c with A the uncentred second moment.

    Uncentred, it needs no bias: the direction of the mean takes its place. (arXiv 2603.29765 adds a column of ones
    instead, which a stock gate cannot store.)
    """
    return centred(torch.linalg.solve(shrunk(sums.second_DD, penalty), sums.means_CD.T).T)


CLOSED: Mapping[str, Callable[[Sums], torch.Tensor]] = {"centroid": centroid, "lda": lda, "ridge": ridge}


def level(sums: Sums, *, penalty: float = RIDGE) -> torch.Tensor:
    """The direction v [D] with v x as close to 1 as possible for all states x (least squares), with a mean of 1."""
    found_D = torch.linalg.solve(shrunk(sums.second_DD, penalty), sums.mean_D)
    one_D: torch.Tensor = found_D / (found_D @ sums.mean_D)
    return one_D


def shrunk(moment_DD: torch.Tensor, share: float) -> torch.Tensor:
    """The moment plus `share` of its mean eigenvalue on the diagonal."""
    hidden = len(moment_DD)
    scale = share * moment_DD.trace() / hidden
    return moment_DD + scale.clamp(min=torch.finfo(moment_DD.dtype).tiny) * torch.eye(hidden, dtype=moment_DD.dtype)


def folded(bias_C: torch.Tensor, whitened_CD: torch.Tensor, means_CD: torch.Tensor) -> torch.Tensor:
    """b v' [C, D], for the v that is shortest in S among those with v mu_c = 1 for every class mean (least squares).

    `whitened_CD` is S^-1 mu_c, so v = S^-1 M' (M S^-1 M')^-1 1.
    """
    overlap_CC = whitened_CD @ means_CD.T
    share_C = torch.linalg.pinv(overlap_CC, rtol=1e-9) @ torch.ones(len(bias_C), dtype=overlap_CC.dtype)
    folded_CD: torch.Tensor = bias_C[:, None] * (share_C @ whitened_CD)
    return folded_CD


def centred(rows_CD: torch.Tensor) -> torch.Tensor:
    """Rows minus their mean: differences between experts stay, and 16-bit storage loses fewer digits."""
    return rows_CD - rows_CD.mean(dim=0)


def spread(rows_CD: torch.Tensor, sums: Sums) -> float:
    """Standard deviation of the logits W x over all states and classes; their mean over classes is zero."""
    variance = ((rows_CD @ sums.second_DD) * rows_CD).sum(dim=1).mean()
    return float(variance.clamp(min=0).sqrt())
