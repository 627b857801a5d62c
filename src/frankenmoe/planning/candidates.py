"""The backbones that `backbone: auto` tries."""

from frankenmoe.planning.backbone import FALLBACK, distinct_parents
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe.backbone import AUTO, AVERAGE, BASE, GROUPS, REGMEAN, Groups, MergeSettings

MANY = 5  # parents; at lambda 0.7 the sum of that many differences goes too far
MANY_LAMBDA = 0.4
_AVERAGE, _SUM = MergeSettings(method=AVERAGE), MergeSettings(method=FALLBACK.method, scale=1.0)
ROWS = Groups(attention=_AVERAGE, norms=_AVERAGE, embeddings=_SUM, head=_SUM)
"""Embeddings by sum: a fine-tune moves the rows of its own tokens, which an average would divide among all parents."""


def candidates(plan: Plan) -> tuple[MergeSettings | Groups, ...]:
    """From the simplest, what `auto` chooses from; the recipe's own backbone if that is not `auto`."""
    written = plan.recipe.backbone
    if plan.recipe.backbone_for(GROUPS[0]).method != AUTO:
        return (written or MergeSettings(method=BASE),)
    few = len(distinct_parents(plan.nodes)) < MANY
    return (
        MergeSettings(method=BASE),
        MergeSettings(method=AVERAGE),
        FALLBACK if few else MergeSettings(method=FALLBACK.method, scale=MANY_LAMBDA),
        ROWS,
        MergeSettings(method="ties", density=0.5),
        MergeSettings(method=REGMEAN),
    )
