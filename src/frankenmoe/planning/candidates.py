"""The backbones that `backbone: auto` tries."""

from frankenmoe.planning.backbone import FALLBACK, distinct_parents
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe.backbone import AUTO, AVERAGE, BASE, GROUPS, REGMEAN, Groups, MergeSettings

MANY = 5  # parents; at lambda 1 the sum of that many differences goes too far
FEW_LAMBDA, MANY_LAMBDA = 1.0, 0.4


def candidates(plan: Plan) -> tuple[MergeSettings | Groups, ...]:
    """What `auto` chooses from on the experts' data; just the recipe's own backbone if that is not `auto`."""
    written = plan.recipe.backbone
    if plan.recipe.backbone_for(GROUPS[0]).method != AUTO:
        return (written or MergeSettings(method=BASE),)
    few = len(distinct_parents(plan.nodes)) < MANY
    return (
        MergeSettings(method=BASE),
        MergeSettings(method=AVERAGE),
        FALLBACK,
        MergeSettings(method=FALLBACK.method, scale=FEW_LAMBDA if few else MANY_LAMBDA),
        MergeSettings(method="ties", density=0.5),
        MergeSettings(method=REGMEAN),
    )
