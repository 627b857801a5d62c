"""Whether a plan can become the form that was asked for. Does not import torch."""

from frankenmoe.errors import PlanError
from frankenmoe.planning.plan import Plan


def check_buildable(made: Plan, *, virtual: bool, allow_identical: bool) -> None:
    """PlanError when this plan cannot become the form asked for, or only a model that no router can change."""
    lacking = [str(source.name) for source in made.sources if not source.checkpoint.has_weights]
    if lacking:
        raise PlanError(
            f"{', '.join(lacking)} has a config but no weights, which is enough for the bill and not for a model",
            hint="put the safetensors files beside config.json, or name the source by its hub id",
        )
    if made.problems and not virtual:
        target = made.fmt.title if made.fmt else "a checkpoint"
        raise PlanError(
            f"this recipe cannot be built as {target}: {'; '.join(made.problems)}",
            hint="keep it virtual with --virtual: frankenmoe runs it as it is",
        )
    if made.all_identical and not allow_identical:
        raise PlanError(
            f"all {made.experts} experts hold the same weights"
            f"{' in every block compared' if made.identical_sampled else ''}, so no router can make a difference",
            hint="set noise_relative (0.01, say) or give them adapters; --allow-identical builds it anyway, to be "
            "trained later",
        )
