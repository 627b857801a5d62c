"""The backbones that `backbone: auto` tries."""

from frankenmoe.planning.backbone import distinct_parents, far_embeddings
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe.backbone import AUTO, AVERAGE, BASE, GROUPS, REGMEAN, Groups, MergeSettings

MANY = 4  # parents; at lambda 0.7 the sum of that many differences goes too far
FEW_LAMBDA, MANY_LAMBDA = 0.7, 0.4
_BASE, _AVERAGE = MergeSettings(method=BASE), MergeSettings(method=AVERAGE)
TASK_ARITHMETIC = "task_arithmetic"
KEPT = Groups(attention=_AVERAGE, norms=_AVERAGE, embeddings=_BASE, head=_BASE)
"""Embeddings that moved far are each right for their own parent only."""


def candidates(plan: Plan) -> tuple[MergeSettings | Groups, ...]:
    """From the simplest, what `auto` chooses from; the recipe's own backbone if that is not `auto`."""
    written = plan.recipe.backbone
    if plan.recipe.backbone_for(GROUPS[0]).method != AUTO:
        return (written or MergeSettings(method=BASE),)
    parents = len(distinct_parents(plan.nodes))
    return (
        _BASE,
        _AVERAGE,
        _task_arithmetic(FEW_LAMBDA if parents < MANY else MANY_LAMBDA),
        KEPT if far_embeddings(plan.distances) else _raised(parents),
        MergeSettings(method="ties", density=0.5),
        MergeSettings(method=REGMEAN),
    )


def _task_arithmetic(scale: float) -> MergeSettings:
    return MergeSettings.model_validate({"method": TASK_ARITHMETIC, "lambda": scale})


def _raised(parents: int) -> Groups:
    """Embeddings with twice the average's lambda, 1 for two parents.

    A fine-tune moves the embeddings of its own tokens most, which an average divides among all parents.
    """
    twice = _task_arithmetic(round(2 / parents, 2))
    return Groups(attention=_AVERAGE, norms=_AVERAGE, embeddings=twice, head=twice)
