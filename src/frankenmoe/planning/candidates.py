"""The backbones that `backbone: auto` tries."""

from frankenmoe.planning.backbone import distinct_parents, far_embeddings
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe.backbone import AUTO, AVERAGE, BASE, GROUPS, REGMEAN, Groups, MergeSettings

MANY = 4  # parents; at lambda 0.7 the sum of that many differences goes too far
FEW_LAMBDA, MANY_LAMBDA = 0.7, 0.4
_BASE, _AVERAGE = MergeSettings(method=BASE), MergeSettings(method=AVERAGE)
_SUM = MergeSettings(method="task_arithmetic", scale=1.0)
SUMMED = Groups(attention=_AVERAGE, norms=_AVERAGE, embeddings=_SUM, head=_SUM)
"""A fine-tune moves the embeddings of its own tokens, which an average would divide among all parents."""
KEPT = Groups(attention=_AVERAGE, norms=_AVERAGE, embeddings=_BASE, head=_BASE)
"""Embeddings that moved far are each right for their own parent only."""


def candidates(plan: Plan) -> tuple[MergeSettings | Groups, ...]:
    """From the simplest, what `auto` chooses from; the recipe's own backbone if that is not `auto`."""
    written = plan.recipe.backbone
    if plan.recipe.backbone_for(GROUPS[0]).method != AUTO:
        return (written or MergeSettings(method=BASE),)
    few = len(distinct_parents(plan.nodes)) < MANY
    return (
        _BASE,
        _AVERAGE,
        MergeSettings(method=_SUM.method, scale=FEW_LAMBDA if few else MANY_LAMBDA),
        KEPT if far_embeddings(plan.distances) else SUMMED,
        MergeSettings(method="ties", density=0.5),
        MergeSettings(method=REGMEAN),
    )
