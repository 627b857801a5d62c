"""Which stages a recipe asks for, in order, and what can be known to fail before the first of them."""

from collections.abc import Iterable

from frankenmoe.pipeline.after import AFTER
from frankenmoe.pipeline.job import Job, Stage
from frankenmoe.pipeline.model import CHAIN, MODEL_STAGE, chain
from frankenmoe.planning.buildable import check_buildable


def stages_of(job: Job) -> tuple[Stage, ...]:
    """The steps that this recipe asks for, in order."""
    changing = [CHAIN[key] for key in chain(job)]
    after = [stage for key, stage in AFTER.items() if getattr(job.recipe, key) is not None]
    return (*changing, MODEL_STAGE, *after)


def check(job: Job, stages: Iterable[Stage]) -> None:
    """Everything that can be known to fail, before the first step."""
    trained = job.recipe.train is not None
    check_buildable(job.plan, virtual=job.build.virtual, allow_identical=job.build.allow_identical or trained)
    for stage in stages:
        stage.check(job)
