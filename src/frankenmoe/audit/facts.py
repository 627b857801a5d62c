"""Sums, gate and distances of every router as plain data, one table per router.

Shape suffixes: C domains, E experts, D hidden.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from frankenmoe.audit import stats
from frankenmoe.audit.collect import CLOSE, RouterSums
from frankenmoe.audit.measures import CAPACITIES
from frankenmoe.audit.weights import Distances, groups
from frankenmoe.errors import NumericsError

DEGENERATE = 5.0  # the condition number above which mergekit-moe warns of a degenerate gate
DIGITS = 5  # significant digits, so that the page of 64 experts stays small

Facts = dict[str, Any]


def router_facts(
    sums: RouterSums,
    gate_ED: torch.Tensor,
    *,
    domains: Sequence[str],
    own: Sequence[int | None],
    distances: Distances | None,
    moved: float | None,
) -> Facts:
    """One router's table. `own[c]` is the expert of domain c, or None.

    Only outer routers have `distances` and `moved`, the relative change of the layer's output with other experts
    chosen. Raises NumericsError if the router's logits are not finite.
    """
    if not math.isfinite(float(sums.prob_E.sum()) + sums.spread):
        raise NumericsError(
            f"the router of layer {sums.layer}{f', path {sums.path}' if sums.path else ''} gives logits that are not "
            "finite numbers",
            hint="load the MoE with dtype float32, or build its routers again",
        )
    return {
        "layer": sums.layer,
        "path": sums.path,
        "experts": sums.experts,
        "top_k": sums.top_k,
        "tokens": sums.tokens,
        "load": _load(sums),
        "domains": _domains(sums, domains, own),
        "gate": _gate(sums, gate_ED),
        "capacity": _capacity(sums),
        "apart": None if distances is None else _apart(distances, moved),
    }


def _load(sums: RouterSums) -> Facts:
    counts_E = sums.counts_CE.sum(dim=0)
    tokens = max(sums.tokens, 1)
    prob_E = sums.prob_E / tokens
    return {
        "assignments": counts_E.tolist(),
        "share": rounded(stats.load(counts_E)),
        "weight": rounded(sums.weight_E / tokens),
        "probability": rounded(prob_E),
        "cv": rounded(stats.coefficient_of_variation(counts_E)),
        "max_vio": rounded(stats.max_violation(counts_E)),
        "switch_balance": rounded(stats.switch_balance(counts_E, prob_E)),
        "dead": stats.dead(counts_E),
        "entropy": rounded(sums.entropy / tokens),
        "entropy_share": rounded(sums.entropy / tokens / math.log(sums.experts)) if sums.experts > 1 else 0.0,
        "margin": rounded(sums.margin / tokens) if sums.has_margin else None,
        "close_share": rounded(sums.close / tokens) if sums.has_margin else None,
        "close_below": CLOSE,
    }


def _domains(sums: RouterSums, domains: Sequence[str], own: Sequence[int | None]) -> Facts | None:
    """Counts of domain against expert; None for a text without labels."""
    if all(expert is None for expert in own):
        return None
    tokens_C = sums.first_CE.sum(dim=1)
    first = stats.own_share(sums.first_CE, own, tokens_C=tokens_C)
    among = stats.own_share(sums.counts_CE, own, tokens_C=tokens_C)
    labelled = [row for row, expert in enumerate(own) if expert is not None]
    return {
        "first": dict(zip(domains, sums.first_CE.tolist(), strict=True)),
        "chosen": dict(zip(domains, sums.counts_CE.tolist(), strict=True)),
        "own_first": {name: rounded(share) for name, share in zip(domains, first, strict=True)},
        "own_chosen": {name: rounded(share) for name, share in zip(domains, among, strict=True)},
        "information": rounded(stats.mutual_information(sums.first_CE[labelled])),
        "most_information": rounded(math.log2(max(1, min(len(labelled), sums.experts)))),
    }


def _gate(sums: RouterSums, gate_ED: torch.Tensor) -> Facts:
    wide_ED = gate_ED.detach().float().cpu()
    alike = stats.largest_cosine(wide_ED)
    condition, centred = stats.condition_number(wide_ED), stats.centred_condition_number(wide_ED)
    lengths_E = torch.linalg.vector_norm(wide_ED, dim=1)
    tokens = max(sums.tokens, 1)
    return {
        "cosines": rounded(stats.cosines(wide_ED)),
        "largest_cosine": rounded(alike[0]) if alike else None,
        "most_alike": list(alike[1]) if alike else None,
        # JSON has no infinity: null means that the rows are linearly dependent
        "condition": rounded(condition) if math.isfinite(condition) else None,
        "condition_centred": rounded(centred) if math.isfinite(centred) else None,
        "degenerate": condition > DEGENERATE,
        "row_lengths": [rounded(float(lengths_E.min())), rounded(float(lengths_E.max()))],
        "logit_spread": rounded(sums.spread / tokens),
        "hidden_norm": rounded(sums.norm / tokens),
    }


def _capacity(sums: RouterSums) -> Facts:
    assignments = max(1, int(sums.counts_CE.sum()))
    return {
        "over": {str(factor): rounded(over / assignments) for factor, over in zip(CAPACITIES, sums.over, strict=True)},
        "dropped": rounded(sums.dropped / assignments),
        "fewest_tokens": int(sums.counts_CE.sum(dim=0).min()),
    }


def _apart(distances: Distances, moved: float | None) -> Facts:
    pairs = stats.off_diagonal(distances.pairs_EE)
    return {
        "reference": distances.reference,
        "paths": list(distances.paths),
        "pairs": rounded(distances.pairs_EE),
        "nearest": rounded(float(pairs.min())) if len(pairs) else None,
        "median": rounded(float(pairs.median())) if len(pairs) else None,
        "farthest": rounded(float(pairs.max())) if len(pairs) else None,
        "to_reference": rounded(distances.to_reference_E),
        "identical": [list(group) for group in distances.identical],
        "moved": None if moved is None else rounded(moved),
    }


def identical_everywhere(distances: Sequence[Distances]) -> list[list[str]]:
    """Groups of experts, by path, with the same weights in every layer."""
    paths = distances[0].paths
    firsts = [{member: group[0] for group in layer.identical for member in group} for layer in distances]
    keys = [tuple(first.get(expert, expert) for first in firsts) for expert in range(len(paths))]
    return [[paths[expert] for expert in group] for group in groups(keys)]


def rounded(value: Any) -> Any:
    """Numbers to DIGITS significant digits, tensors as lists; None stays None."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return rounded(value.tolist())
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
